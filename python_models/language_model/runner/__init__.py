"""Computes a step: batches, attention backends, decoders, CUDA graphs, ranks."""
