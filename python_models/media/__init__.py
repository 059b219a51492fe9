"""Media: guarded fetching, decoding and hashing of pictures, videos and sounds."""
