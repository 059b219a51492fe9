"""A typed Python client of the ensembles, over gRPC."""

from .client import ChatStream, Client

__all__ = ["ChatStream", "Client"]
