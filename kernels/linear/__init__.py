"""Linear layers of few rows: memory-bound, fused with what surrounds them."""
