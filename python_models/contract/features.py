"""Packed features: how ``preprocess`` hands media to an encoder stage, as one UINT8 tensor.

Every family has its own named tensors (``pixel_values``, ``image_grid_thw``, ``input_features`` ...), so the wire has
one container for all: the safetensors format, with the items described in its metadata. Item k's tensors are named
``"{k}.{name}"``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from .errors import ErrorKind, TriptychError

_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
"""numpy's names -> those of safetensors."""


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
    tensors = {f"{k}.{name}": value for k, item in enumerate(items) for name, value in item.tensors.items()}
    described = [{"modality": i.modality, "digest": i.digest, "num_rows": i.num_rows} for i in items]
    header: dict[str, Any] = {"__metadata__": {"items": json.dumps(described)}}
    end = 0
    # wide elements first: each tensor then begins at a multiple of its element's size
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    for name in order:
        value, start = tensors[name], end
        end += value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    # written here and not by the library, which copies everything three times
    packed = np.empty(8 + len(head) + end, dtype=np.uint8)
    packed[:8] = np.frombuffer(len(head).to_bytes(8, "little"), np.uint8)
    packed[8 : 8 + len(head)] = np.frombuffer(head, np.uint8)
    at = 8 + len(head)
    for name in order:
        value = tensors[name]
        packed[at : at + value.nbytes].view(value.dtype).reshape(value.shape)[...] = value
        at += value.nbytes
    return packed


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
