"""A tower with its projector, by transformers' own modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from . import evs
from .base import PrunedRows


class TransformersEncoder(ABC):
    """A tower with its projector (see :class:`.base.Encoder`)."""

    def __init__(self, model: Any, device: str, dtype: torch.dtype) -> None:
        self.model = model
        self.base = model.base_model
        self.config = model.config
        self.device = torch.device(device)
        self.dtype = dtype
        self.width = int(self.config.get_text_config().hidden_size)

    @abstractmethod
    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """Run the tower over items of one modality: rows of all items, a tensor or one tensor per item."""

    @torch.no_grad()
    def encode(self, items: Sequence[EncoderItem]) -> list[torch.Tensor | PrunedRows]:
        """See :meth:`.base.Encoder.encode`."""
        rows: dict[int, torch.Tensor | PrunedRows] = {}
        for modality in dict.fromkeys(item.modality for item in items):
            chosen = [k for k, item in enumerate(items) if item.modality == modality]
            out = self.features(modality, [items[k] for k in chosen])
            flat = (out if isinstance(out, torch.Tensor) else torch.cat(list(out))).reshape(-1, self.width)
            counts = [_tower_rows(items[k]) for k in chosen]
            if len(flat) != sum(counts):
                raise TriptychError(
                    ErrorKind.STAGE_FAILED,
                    f"the {modality} encoder gave {len(flat)} embedding rows where {sum(counts)} were expected",
                )
            for k, own in zip(chosen, torch.split(flat, counts), strict=True):
                pruning = items[k].tensors.get(evs.TENSOR)
                rows[k] = own if pruning is None else evs.prune(own, pruning)
        return [rows[k] for k in range(len(items))]

    def to_device(self, array: NDArray[np.generic]) -> torch.Tensor:
        """A numpy array on the encoder's device."""
        # Arrays from the wire may be read-only views; torch wants its own memory.
        return torch.from_numpy(np.array(array)).to(self.device)


def _tower_rows(item: EncoderItem) -> int:
    """Rows of an item before any is left out."""
    pruning = item.tensors.get(evs.TENSOR)
    return item.num_rows if pruning is None else int(pruning[1:].prod())
