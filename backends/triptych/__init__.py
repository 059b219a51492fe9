"""The Triton Python-based backend that hosts any stage."""
