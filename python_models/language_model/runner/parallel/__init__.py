"""Tensor and expert parallel: one process for each GPU."""
