"""Paged attention: split-KV decode and prefill over ragged batches."""
