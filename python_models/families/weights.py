"""Weights of a decoder read slice by slice from the checkpoint's files, under transformers' names.

transformers knows how a checkpoint's keys become the parameters of its modules: renames, experts stacked and joined,
transposed matrices. Its own rules are applied here to names alone; the tensors are read when a slice of one is asked
for, and only that slice. What these rules do beyond stacking, joining and transposing is carried out on whole tensors.
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..contract.errors import ErrorKind, TriptychError
from .files import Bounds, Part, Tensors, unfit, whole
from .quantised import open_tensors

_FORMERLY_STORED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$")


class Stored:
    """A tensor of the checkpoint."""

    def __init__(self, files: Tensors, key: str) -> None:
        self.key = key
        self.shape = files.shape(key)
        self._files = files

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`Part`."""
        return self._files.read(self.key, bounds)


class Stacked:
    """Parts of one shape along a new first dimension."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self.shape = (len(parts), *parts[0].shape)

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`Part`."""
        start, stop = bounds[0]
        return torch.stack([part.read(bounds[1:]) for part in self._parts[start:stop]])


class Joined:
    """Parts one after the other along a dimension."""

    def __init__(self, parts: Sequence[Part], dim: int) -> None:
        self._parts = parts
        self._dim = dim % len(parts[0].shape)
        size = sum(part.shape[self._dim] for part in parts)
        self.shape = (*parts[0].shape[: self._dim], size, *parts[0].shape[self._dim + 1 :])

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`Part`."""
        start, stop = bounds[self._dim]
        found, offset = [], 0
        for part in self._parts:
            size = part.shape[self._dim]
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                found.append(part.read((*bounds[: self._dim], (low, high), *bounds[self._dim + 1 :])))
            offset += size
        return found[0] if len(found) == 1 else torch.cat(found, self._dim)


class Turned:
    """A part with two dimensions exchanged."""

    def __init__(self, part: Part, first: int, second: int) -> None:
        self._part = part
        self._dims = first, second
        self.shape = self._turn(part.shape)

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`Part`."""
        return self._part.read(self._turn(bounds)).transpose(*self._dims).contiguous()

    def _turn(self, values: Sequence[Any]) -> tuple[Any, ...]:
        turned = list(values)
        first, second = self._dims
        turned[first], turned[second] = turned[second], turned[first]
        return tuple(turned)


class Converted:
    """One of the tensors that transformers' own conversion makes of whole tensors."""

    def __init__(self, convert: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> None:
        self._convert = convert
        self.shape = shape

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`Part`."""
        return self._convert()[tuple(slice(start, stop) for start, stop in bounds)].clone()


@dataclass
class _Entry:
    """What becomes of one parameter: its converter (None: a plain tensor) and the keys for each source pattern."""

    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)


class SafetensorsSource:
    """Weights of a decoder by slices (see :class:`.base.WeightSource`).

    Names are relative to the decoder stack; the head's begin with ``lm_head``.
    """

    def __init__(
        self, model: Any, folder: Path, text: str, device: str, dtype: torch.dtype, *, progress: bool = False
    ) -> None:
        """Read the names of everything; no weights yet.

        Args:
            model: the whole model of transformers on the meta device, in the dtype that is wanted.
            folder: of the checkpoint.
            text: path of the decoder stack in it.
            device, dtype: of what :meth:`get` gives; parameters that transformers keeps in float32 stay so.
            progress: show a bar.

        Raises:
            TriptychError: MODEL_NOT_FOUND without weight files, STAGE_FAILED naming weights that are missing or of
                another shape.
        """
        self._model = model
        self._text = text
        self._wanted: Mapping[str, torch.Tensor] = {
            name: tensor for name, tensor in model.state_dict().items() if name.startswith((f"{text}.", "lm_head."))
        }
        self._dtypes = _dtypes(model, self._wanted, dtype)
        self._files = open_tensors(folder, device, dtype)
        self._parts = self._resolve(_entries(model, self._files.keys()))
        self._ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
        missing = sorted(name for name in self._wanted if self._ties.get(name, name) not in self._parts)
        if missing:
            raise unfit(folder, "lacks weights of the language model", missing)
        self._check_shapes(folder)
        self._seen: set[str] = set()
        self._bar = tqdm(total=len(self._wanted), desc="Loading weights", disable=not progress)

    def get(self, name: str, dim: int | None = None, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """A weight, or [start, stop) of one of its dimensions.

        Raises:
            KeyError: there is no such weight.
        """
        full = name if name.startswith("lm_head.") else f"{self._text}.{name}"
        stored = self._ties.get(full, full)
        part = self._parts[stored]
        bounds = [(0, size) for size in part.shape]
        if dim is not None:
            bounds[dim] = (start or 0, part.shape[dim] if stop is None else stop)
        if full not in self._seen:
            self._seen.add(full)
            self._bar.update()
        return part.read(tuple(bounds)).to(self._dtypes.get(stored) or self._dtypes[full])

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def _check_shapes(self, folder: Path) -> None:
        wrong = [
            f"{name} is {list(self._parts[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in self._wanted.items()
            if name in self._parts and tuple(self._parts[name].shape) != tuple(tensor.shape)
        ]
        if wrong:
            raise unfit(folder, "has weights of another shape than the language model's", wrong)

    def _resolve(self, entries: Mapping[str, _Entry]) -> dict[str, Part]:
        found: dict[str, Part] = {}
        for name, entry in entries.items():
            if entry.converter is None:
                if name in self._wanted:
                    found[name] = Stored(self._files, next(iter(entry.sources.values()))[0])
                continue
            names = [name.replace(entry.converter.target_patterns[0], t) for t in entry.converter.target_patterns]
            wanted = [target for target in names if target in self._wanted]
            if not wanted:
                continue
            part = self._lazily(entry, tuple(self._wanted[name].shape)) if len(names) == 1 else None
            if part is not None:
                found[name] = part
                continue
            whole = _Whole(self._model, self._files, name, entry)
            for target in wanted:
                found[target] = Converted(whole.taker(target), tuple(self._wanted[target].shape))
        return found

    def _lazily(self, entry: _Entry, shape: tuple[int, ...]) -> Part | None:
        """The conversion as a part, or None where it does what parts cannot."""
        stored = {pattern: [Stored(self._files, key) for key in keys] for pattern, keys in entry.sources.items()}
        parts: dict[str, list[Part]] = {pattern: list(each) for pattern, each in stored.items()}
        for operation in entry.converter.operations:
            kind = type(operation).__name__
            if kind == "MergeModulelist" and operation.dim == 0:
                for each in stored.values():
                    _check_one_shape(each)
                parts = {pattern: [Stacked(each)] for pattern, each in parts.items()}
            elif kind == "Concatenate":
                ordered = [part for pattern in entry.converter.source_patterns for part in parts.get(pattern, ())]
                parts = {"": [Joined(ordered, operation.dim)]}
            elif kind == "Transpose" and len(parts) == 1 and all(len(each) == 1 for each in parts.values()):
                ((part,),) = parts.values()
                if not operation.check_dims or part.shape != shape:
                    parts = {"": [Turned(part, operation.dim0, operation.dim1)]}
            else:
                return None
        if len(parts) != 1 or any(len(each) != 1 for each in parts.values()):
            return None
        ((part,),) = parts.values()
        return part


def _check_one_shape(parts: Sequence[Stored]) -> None:
    """Raises TriptychError (STAGE_FAILED) where weights that become one have different shapes."""
    first = parts[0]
    if other := next((part for part in parts if part.shape != first.shape), None):
        raise TriptychError(
            ErrorKind.STAGE_FAILED,
            f"the checkpoint's weights {first.key} and {other.key} become one, but are {list(first.shape)} and "
            f"{list(other.shape)}",
            "settings.model",
        )


class _Whole:
    """Runs a conversion of transformers when the first of its results is taken; gives each of them away once."""

    def __init__(self, model: Any, files: Tensors, name: str, entry: _Entry) -> None:
        self._model, self._files, self._name, self._entry = model, files, name, entry
        self._made: dict[str, torch.Tensor] = {}

    def taker(self, target: str) -> Callable[[], torch.Tensor]:
        return lambda: self._take(target)

    def _take(self, target: str) -> torch.Tensor:
        if target not in self._made:
            converter = copy.deepcopy(self._entry.converter)
            for pattern, keys in self._entry.sources.items():
                for key in keys:
                    tensor = self._files.read(key, whole(self._files.shape(key)))
                    converter.add_tensor(self._name, key, pattern, lambda tensor=tensor: tensor)
            made = converter.convert(self._name, model=self._model, config=self._model.config)
            self._made = {k: v[0] if isinstance(v, list) else v for k, v in made.items()}
        return self._made[target]


class RandomSource:
    """Random weights of a model's shapes, to measure speed; what several ranks hold whole is the same on all."""

    def __init__(self, model: Any, text: str, device: str, dtype: torch.dtype) -> None:
        """Args: as :class:`SafetensorsSource`."""
        self._text, self._device = text, device
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._dtypes = _dtypes(model, model.state_dict(), dtype)

    def get(self, name: str, dim: int | None = None, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """See :meth:`SafetensorsSource.get`."""
        full = name if name.startswith("lm_head.") else f"{self._text}.{name}"
        shape = list(self._shapes[full])
        if dim is not None:
            shape[dim] = (shape[dim] if stop is None else stop) - (start or 0)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{name} {start}".encode()))
        drawn = torch.randn(shape, generator=generator, device=self._device, dtype=self._dtypes[full])
        # as wide as a checkpoint's: matrices keep the size of what they multiply, norms leave it
        return drawn.mul_(0.02) if len(shape) > 1 else drawn.mul_(0.02).add_("norm" in name)

    def close(self) -> None:
        """Nothing to do."""


def _dtypes(model: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """As ``from_pretrained`` chooses them."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    patterns = [re.compile(re.escape(pattern).replace(r"\*", ".*")) for pattern in kept]
    return {
        name: torch.float32 if any(p.search(name) for p in patterns) else tensor.dtype
        for name, tensor in tensors.items()
    }


def strangers(model: Any, keys: Sequence[str]) -> list[str]:
    """Tensors of a checkpoint that are no part of a whole model, and that its class does not say to ignore."""
    known = {key for entry in _entries(model, keys).values() for each in entry.sources.values() for key in each}
    # buffers that older versions of transformers stored
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_FORMERLY_STORED]
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return sorted(key for key in keys if key not in known and ignored.search(key) is None)


def _entries(model: Any, keys: Sequence[str]) -> dict[str, _Entry]:
    """Parameter name -> what it is made of: transformers' ``convert_and_load_state_dict_in_model`` on names alone."""
    from transformers import conversion_mapping, core_model_loading

    rules = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, _Entry] = {}
    for key in sorted(keys, key=core_model_loading.dot_natural_key):
        name, pattern = core_model_loading.rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = core_model_loading.rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue
        entry = found.setdefault(name, _Entry(None if pattern is None else of_pattern[pattern]))
        entry.sources.setdefault(pattern or key, []).append(key)
    return found
