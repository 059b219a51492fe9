"""Writes a Triton model repository (config.pbtxt files) from the contract."""
