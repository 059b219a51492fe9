"""Where weights come from while they are fused."""

from __future__ import annotations

import torch
from torch import nn


class ModuleSource:
    """Weights of transformers' modules that are loaded already; a ``families.base.WeightSource``."""

    def __init__(self, text_model: nn.Module, lm_head: nn.Module) -> None:
        self._roots = {"lm_head": lm_head}
        self._text_model = text_model

    def get(self, name: str, dim: int | None = None, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """See ``WeightSource``; a whole weight is the module's own, a part is a view of it."""
        tensor = self._owner(name)[2].detach()
        return tensor if dim is None else tensor.narrow(dim, start or 0, _stop(tensor, dim, stop) - (start or 0))

    def close(self) -> None:
        """Nothing is held open."""

    def share(self, name: str, tensor: torch.Tensor) -> None:
        """Let the module use ``tensor``, which equals its weight, and let go of its own copy."""
        owner, leaf, old = self._owner(name)
        if old.shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(old.shape)}, not {tuple(tensor.shape)}")
        if isinstance(old, nn.Parameter):
            old.data = tensor
        else:
            setattr(owner, leaf, tensor)

    def _owner(self, name: str) -> tuple[nn.Module, str, torch.Tensor]:
        first, _, rest = name.partition(".")
        root, path = (self._roots[first], rest) if first in self._roots else (self._text_model, name)
        parent, _, leaf = path.rpartition(".")
        try:
            owner = root.get_submodule(parent)
            tensor = getattr(owner, leaf)
        except AttributeError:
            raise KeyError(name) from None
        if not isinstance(tensor, torch.Tensor):
            raise KeyError(name)
        return owner, leaf, tensor


def _stop(tensor: torch.Tensor, dim: int, stop: int | None) -> int:
    return tensor.shape[dim] if stop is None else stop
