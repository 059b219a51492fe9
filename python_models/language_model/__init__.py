"""The language model stage: continuous batching over a paged KV cache."""
