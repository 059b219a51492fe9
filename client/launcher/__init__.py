"""Finds, starts and supervises a tritonserver with a model repository."""
