"""Gated activations: SiLU(gate) * up and GELU(gate) * up."""
