"""Decoders of the common dense and mixture-of-experts families with fused weights, for speed."""

from .builder import build, random_decoder, random_weights
from .decoder import FusedDecoder
from .shard import Alone, Collectives, Shard
from .source import ModuleSource

__all__ = [
    "Alone",
    "Collectives",
    "FusedDecoder",
    "ModuleSource",
    "Shard",
    "build",
    "random_decoder",
    "random_weights",
]
