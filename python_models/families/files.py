"""The tensors of a checkpoint's files: safetensors, else those of ``torch.save``."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch

from ..contract.errors import ErrorKind, TriptychError

Bounds = tuple[tuple[int, int], ...]
"""[start, stop) of every dimension."""
_INDEX = "model.safetensors.index.json"
_OLDER_INDEX = "pytorch_model.bin.index.json"
_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}
"""Names in the headers of safetensors; those of numbers that are quantised."""


class Part(Protocol):
    """A tensor that is not there yet."""

    shape: tuple[int, ...]

    def read(self, bounds: Bounds) -> torch.Tensor:
        """A slice of it."""


class Tensors(Protocol):
    """Tensors by name, read slice by slice."""

    def keys(self) -> list[str]:
        """Names of all."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one."""

    def read(self, key: str, bounds: Bounds) -> torch.Tensor:
        """A slice of one, on the device."""


class TorchFile:
    """A file of ``torch.save``, as older checkpoints have them, used like one of safetensors; it is mapped."""

    def __init__(self, path: Path) -> None:
        # nothing but tensors is unpickled
        self._tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def keys(self) -> list[str]:
        """Names of its tensors."""
        return list(self._tensors)

    def get_tensor(self, key: str) -> torch.Tensor:
        """The whole of one; a copy, as what the file holds may change."""
        return self._tensors[key].clone()

    def get_slice(self, key: str) -> TorchSlice:
        """What parts of one are taken from."""
        return TorchSlice(self._tensors[key])


class TorchSlice:
    """A tensor that parts are taken from."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Of the whole."""
        return list(self._tensor.shape)

    def get_dtype(self) -> torch.dtype:
        """Of the whole."""
        return self._tensor.dtype

    def __getitem__(self, bounds: tuple[slice, ...]) -> torch.Tensor:
        return self._tensor[bounds].clone()


class Files:
    """The tensors of a checkpoint's files as they are stored (see :class:`Tensors`), read to a device."""

    def __init__(self, folder: Path, device: str) -> None:
        """Raises TriptychError (MODEL_NOT_FOUND) where there are no such files, or they cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            # read slice by slice and not mapped: pages of a mapped file would stay in this process's memory
            files: list[Any] = [
                safe_open(str(path), framework="pt", device="cpu", backend="pread")
                for path in _paths(folder, _INDEX, "model.safetensors", "*.safetensors")
            ] or [TorchFile(path) for path in _paths(folder, _OLDER_INDEX, "pytorch_model.bin", "pytorch_model*.bin")]
            if not files:
                raise FileNotFoundError("it has neither *.safetensors files nor pytorch_model*.bin")
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise TriptychError(
                ErrorKind.MODEL_NOT_FOUND, f"the weights of {folder} cannot be loaded: {error}", "settings.model"
            ) from None
        self._device = device
        self._where: dict[str, Any] = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - it is no dictionary

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._where[key].get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype | None:
        """Of a tensor, where it is one that numbers are quantised to."""
        found = self._where[key].get_slice(key).get_dtype()
        return _DTYPES.get(found) if isinstance(found, str) else found

    def read(self, key: str, bounds: Bounds) -> torch.Tensor:
        """A slice of a tensor, on the device, in the file's dtype."""
        if not bounds:
            part: torch.Tensor = self._where[key].get_tensor(key)
        else:
            part = self._where[key].get_slice(key)[tuple(slice(start, stop) for start, stop in bounds)]
        return part.to(self._device)


def whole(shape: tuple[int, ...]) -> Bounds:
    """The bounds of a whole tensor."""
    return tuple((0, size) for size in shape)


def _paths(folder: Path, index: str, single: str, pattern: str) -> list[Path]:
    """Files of weights: those that the index names, else the one of the usual name, else all there are."""
    if (folder / index).is_file():
        names = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [folder / single] if (folder / single).is_file() else sorted(folder.glob(pattern))


def unfit(folder: Path, what: str, names: Collection[str]) -> TriptychError:
    """The error of a checkpoint that does not fit the model; names at most eight."""
    listed = sorted(names)
    shown = ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    return TriptychError(ErrorKind.STAGE_FAILED, f"the checkpoint {folder} {what}: {shown}", "settings.model")
