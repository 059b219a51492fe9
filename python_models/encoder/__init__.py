"""The encoder stages: packed features in, embeddings out, with a cache keyed by content."""
