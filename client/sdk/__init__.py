"""A typed Python client of the ensembles, over gRPC."""
