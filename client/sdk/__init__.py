"""Typed Python clients of the ensembles, over gRPC."""

from .client import AsyncClient, Client
from .connection import TLS

__all__ = ["TLS", "AsyncClient", "Client"]
