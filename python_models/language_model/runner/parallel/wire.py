"""What rank 0 and the workers say to each other: framed messages, and a step's slices as packed arrays.

A step is sent once to every worker, so it is plain arrays one after the other, nothing pickled. Rows of media do not
travel here: they are broadcast from device to device (see :mod:`.runner`), only their places and shapes are written.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..step import MediaRows, Slice

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FRAME = struct.Struct("<QQ")
_FIELDS = 8
_COUNTS = 7


class Kind(IntEnum):
    """What a message is.

    Rank 0 sends STEP (packed slices) and CALL (JSON: a method and its arguments); a worker sends RESULT (JSON: of a
    call) and FAILED (JSON: a step raised).
    """

    STEP = 1
    CALL = 2
    RESULT = 3
    FAILED = 4


def frame(kind: Kind, body: bytes) -> bytes:
    """A message as it is sent."""
    return _FRAME.pack(kind, len(body)) + body


def json_frame(kind: Kind, value: Any) -> bytes:
    """A message of JSON."""
    return frame(kind, json.dumps(value).encode())


class Reader:
    """Reads messages from a stream socket; a timeout in the middle of one loses nothing."""

    def __init__(self, connection: socket.socket, flags: int = 0) -> None:
        """Args: ``flags`` of ``recv``."""
        self._connection = connection
        self._flags = flags
        self._buffer = bytearray(_FRAME.size)
        self._filled = 0
        self._kind: Kind | None = None

    def read(self) -> tuple[Kind, bytearray]:
        """The next message.

        Raises:
            TimeoutError, BlockingIOError: nothing more has come yet (as the socket is set up); call again.
            EOFError: the other end is gone.
        """
        while True:
            while self._filled < len(self._buffer):
                try:
                    count = self._connection.recv_into(memoryview(self._buffer)[self._filled :], 0, self._flags)
                except ConnectionError:
                    count = 0
                if not count:
                    raise EOFError
                self._filled += count
            body, kind = self._buffer, self._kind
            if kind is not None:
                self._next(_FRAME.size, None)
                return kind, body
            number, length = _FRAME.unpack(body)
            self._next(length, Kind(number))

    def _next(self, size: int, kind: Kind | None) -> None:
        self._buffer, self._filled, self._kind = bytearray(size), 0, kind


def pack(step: int, slices: Sequence[Slice]) -> bytes:
    """A step's slices, without the rows of their media; ``step`` is its number."""
    media = [part for piece in slices for part in piece.media]
    tables = [table for piece in slices for table in piece.block_tables]
    groups = len(slices[0].block_tables)
    about = [
        (
            len(piece),
            piece.start,
            piece.slot,
            piece.first_on_device,
            piece.num_logits,
            len(piece.media),
            len(piece.spans),
            piece.embed,
        )
        for piece in slices
    ]
    spans = [bound for piece in slices for span in piece.spans for bound in span]
    tokens = np.concatenate([piece.token_ids for piece in slices])
    positions = np.concatenate([piece.position_ids for piece in slices], axis=1)
    counts = (step, len(slices), positions.shape[0], groups, len(tokens), len(media), len(spans) // 2)
    parts: list[NDArray[Any]] = [
        np.array(counts, dtype=np.int64),
        np.array(about, dtype=np.int64),
        np.array([len(table) for table in tables], dtype=np.int64),
        tokens.astype(np.int64, copy=False),
        np.ascontiguousarray(positions, dtype=np.int64),
        np.array([(len(m.positions), m.rows.shape[1], DTYPES.index(m.rows.dtype)) for m in media], dtype=np.int64),
        np.array(spans, dtype=np.int64),
        *(m.positions.astype(np.int64, copy=False) for m in media),
        *(table.astype(np.int32, copy=False) for table in tables),
    ]
    return b"".join([part.tobytes() for part in parts])


def unpack(body: bytearray, receive: Callable[[tuple[int, int], torch.dtype], torch.Tensor]) -> tuple[int, list[Slice]]:
    """What `pack` wrote.

    Args:
        body: of the message; the slices' arrays are views of it.
        receive: (shape, dtype) -> the next rows of media; called in the order in which the slices have them.

    Returns:
        the number of the step, its slices.
    """
    cursor = _Cursor(body)
    step, count, axes, groups, total, num_media, num_spans = cursor.take(_COUNTS).tolist()
    about = cursor.take(count * _FIELDS).reshape(count, _FIELDS).tolist()
    lengths = cursor.take(count * groups).tolist()
    tokens = cursor.take(total)
    positions = cursor.take(axes * total).reshape(axes, total)
    shapes = cursor.take(num_media * 3).reshape(num_media, 3).tolist()
    bounds = cursor.take(num_spans * 2).reshape(num_spans, 2).tolist()
    media = iter([MediaRows(cursor.take(rows), receive((rows, width), DTYPES[kind])) for rows, width, kind in shapes])
    tables = iter([cursor.take(length, np.int32) for length in lengths])
    spans = iter([(start, end) for start, end in bounds])
    slices = []
    offset = 0
    for length, start, slot, first, num_logits, own_media, own_spans, embed in about:
        slices.append(
            Slice(
                token_ids=tokens[offset : offset + length],
                position_ids=positions[:, offset : offset + length],
                start=start,
                block_tables=tuple(next(tables) for _ in range(groups)),
                slot=slot,
                first_on_device=bool(first),
                media=tuple(next(media) for _ in range(own_media)),
                spans=tuple(next(spans) for _ in range(own_spans)),
                num_logits=num_logits,
                embed=bool(embed),
            )
        )
        offset += length
    return step, slices


class _Cursor:
    """Takes arrays off a buffer one after the other."""

    def __init__(self, body: bytearray) -> None:
        self._body = body
        self._offset = 0

    def take(self, count: int, dtype: type[np.generic] = np.int64) -> NDArray[Any]:
        found = np.frombuffer(self._body, dtype, count, self._offset)
        self._offset += found.nbytes
        return found
