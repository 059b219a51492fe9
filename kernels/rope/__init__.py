"""Head norm, rotary embedding and the write into the KV cache, in one pass."""
