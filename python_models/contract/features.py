"""Packed features: how ``preprocess`` hands media to an encoder stage, as one UINT8 tensor.

Every family has its own named tensors (``pixel_values``, ``image_grid_thw``, ``input_features`` ...), so the wire has
one container for all: the safetensors format, with the items described in its metadata. Item k's tensors are named
``"{k}.{name}"``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .errors import ErrorKind, TriptychError


@dataclass(frozen=True)
class EncoderItem:
    """One medium for an encoder.

    Attributes:
        modality: "image", "video" or "audio".
        digest: content digest, the encoder cache's key.
        num_rows: embedding rows it must give.
        tensors: the family's processor outputs for this item alone.
    """

    modality: str
    digest: str
    num_rows: int
    tensors: dict[str, NDArray[np.generic]]


def pack(items: Sequence[EncoderItem]) -> NDArray[np.uint8]:
    """Items -> uint8 [n_bytes]."""
    tensors = {
        f"{k}.{name}": np.ascontiguousarray(value)
        for k, item in enumerate(items)
        for name, value in item.tensors.items()
    }
    head = [{"modality": i.modality, "digest": i.digest, "num_rows": i.num_rows} for i in items]
    return np.frombuffer(save(tensors, {"items": json.dumps(head)}), dtype=np.uint8)


def unpack(packed: NDArray[np.uint8]) -> list[EncoderItem]:
    """uint8 [n_bytes] -> items.

    Raises:
        TriptychError: INVALID_REQUEST where the bytes are not what :func:`pack` writes.
    """
    data = packed.tobytes()
    try:
        header_size = int.from_bytes(data[:8], "little")
        head = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"]["items"])
        tensors = load(data)
        items = [EncoderItem(h["modality"], h["digest"], int(h["num_rows"]), {}) for h in head]
        for name, value in tensors.items():
            k, _, key = name.partition(".")
            items[int(k)].tensors[key] = value
    except (SafetensorError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise TriptychError(
            ErrorKind.INVALID_REQUEST, f"features are not a packed safetensors container: {error}", "features"
        ) from None
    return items
