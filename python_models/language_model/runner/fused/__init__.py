"""Decoders with fused weights, built from the modules or the files of a checkpoint."""
