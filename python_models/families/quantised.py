"""Quantised weights, read as what they stand for: slice by slice, under the names of plain ones.

A quantised matrix is stored as several tensors: small numbers, the scales of blocks or groups of them, zero points.
Here they are one tensor, ``<module>.weight``, whose slices are computed in float32 on the stage's device when they are
asked for, some rows at a time, and given in the stage's dtype. So every quantisation works with every family, every
decoder and every number of GPUs, and takes the memory of the dtype it is turned into. Activations are not quantised.

Formats, compared with what transformers, AutoGPTQ, AutoAWQ, compressed-tensors and bitsandbytes document and write:

- FP8: ``weight`` in float8, ``weight_scale_inv`` (blocks) or ``weight_scale`` (a tensor, a row), both factors; fused
  experts have ``<name>_scale_inv``. Block-wise: DeepSeek-V3, arXiv 2412.19437.
- INT8 of compressed-tensors: the same with int8; of bitsandbytes (arXiv 2208.07339): ``SCB`` / 127 is a row's factor.
- GPTQ (arXiv 2210.17323): ``qweight`` packs inputs, ``qzeros`` outputs, lowest bits first; ``g_idx`` is each input's
  group.
- AWQ (arXiv 2306.00978): both pack outputs, those of eight in the order 0 2 4 6 1 3 5 7.
- Integers of compressed-tensors: ``weight_packed`` packs inputs, offset to be positive.
- MXFP4 (OCP Microscaling formats, arXiv 2310.10537): ``_blocks`` of 32 in e2m1, lowest bits first, ``_scales`` are
  exponents.
- NF4 and FP4 of bitsandbytes (arXiv 2305.14314): flat, highest bits first, ``quant_map`` is the code, ``absmax`` the
  factor of a block, itself quantised where there is ``nested_absmax``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..contract.errors import ErrorKind, TriptychError
from .files import Bounds, Files, Part, Tensors, whole
from .quantisation import Quantisation

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of eight outputs in a word."""
_AT_ONCE = 2**25
"""Numbers that are computed in float32 at a time: each takes some ten bytes, and four tensors are read side by side."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# of activations and of the KV cache, which are not quantised here
_UNUSED = re.compile(r"[._](input|output|activation|k|v|q|kv|kv_cache)_(scale|zero_point)(_inv)?$|\.input_scale_ub$")


def open_tensors(folder: Path, device: str, dtype: torch.dtype) -> Tensors:
    """The weights of a checkpoint, quantised ones as what they stand for.

    Args:
        folder: of the checkpoint.
        device: where what is read goes.
        dtype: of what was quantised; others have that of the file.

    Raises:
        TriptychError: MODEL_NOT_FOUND without weight files; UNSUPPORTED for a quantisation that cannot be read;
            STAGE_FAILED naming a weight whose scales are missing or do not fit.
    """
    files = Files(folder, device)
    path = folder / "config.json"
    declared = Quantisation.of(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    finder = _Finder(folder, files, declared)
    finder.find()
    return Dequantised(files, finder.parts, finder.used, dtype) if finder.parts or declared is not None else files


class Dequantised:
    """See :class:`.files.Tensors`."""

    def __init__(self, files: Files, parts: Mapping[str, Part], used: set[str], dtype: torch.dtype) -> None:
        """Args: as they are stored; the quantised ones by the name of a plain one; what these are made of; their dtype
        when they are read."""
        self._files, self._parts, self._dtype = files, parts, dtype
        plain = (key for key in files.keys() if key not in used and not _UNUSED.search(key))  # noqa: SIM118
        self._keys = [*plain, *parts]

    def keys(self) -> list[str]:
        """Names of all."""
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one."""
        return self._parts[key].shape if key in self._parts else self._files.shape(key)

    def read(self, key: str, bounds: Bounds) -> torch.Tensor:
        """A slice of one, on the device."""
        if key not in self._parts:
            return self._files.read(key, bounds)
        part = self._parts[key]
        (start, stop), *others = bounds or whole(part.shape)
        shape = [stop - start, *(last - first for first, last in others)]
        step = max(_AT_ONCE // max(torch.Size(shape[1:]).numel(), 1), 1)
        if shape[0] <= step:
            return part.read(((start, stop), *others)).to(self._dtype)
        made: torch.Tensor | None = None
        for low in range(start, stop, step):
            rows = part.read(((low, min(low + step, stop)), *others))
            made = rows.new_empty(shape, dtype=self._dtype) if made is None else made
            made[low - start : low - start + len(rows)] = rows
        assert made is not None
        return made


class _Finder:
    """Which stored tensors make up a weight."""

    def __init__(self, folder: Path, files: Files, declared: Quantisation | None) -> None:
        self._folder, self._files = folder, files
        self._declared = declared or Quantisation("")
        self._keys = set(files.keys())
        self.parts: dict[str, Part] = {}
        self.used: set[str] = set()

    def find(self) -> None:
        for key in sorted(self._keys):
            base, _, leaf = key.rpartition(".")
            dtype = self._files.dtype(key)
            if leaf == "qweight" and self._declared.method in ("gptq", "awq"):
                self._add(f"{base}.weight", self._groups(base), key)
            elif leaf == "weight_packed":
                self._add(f"{base}.weight", self._packed(base), key)
            elif key.endswith("_blocks") and dtype == torch.uint8 and f"{key[:-7]}_scales" in self._keys:
                name = key.removesuffix("_blocks")
                self._add(name, Microscaled(self._files, key, self._take(f"{name}_scales")), key)
            elif leaf.startswith("bitsandbytes__"):
                name = base.removesuffix(".quant_state")
                self._add(name, self._coded(name, key), key)
            elif dtype in _FLOAT8 or (dtype == torch.int8 and leaf == "weight"):
                self._add(key, self._scaled(key, base), key)

    def _add(self, name: str, part: Part, *keys: str) -> None:
        self.parts[name] = part
        self.used.update(keys)

    def _take(self, *names: str) -> str:
        """The first of these that is there."""
        found = self._perhaps(*names)
        if found is None:
            raise self._failed(f"lacks {' or '.join(names)}")
        return found

    def _perhaps(self, *names: str) -> str | None:
        found = next((name for name in names if name in self._keys), None)
        if found is not None:
            self.used.add(found)
        return found

    def _failed(self, what: str) -> TriptychError:
        return TriptychError(ErrorKind.STAGE_FAILED, f"the checkpoint {self._folder} {what}", "settings.model")

    def _scaled(self, key: str, base: str) -> Part:
        if (rows := self._perhaps(f"{base}.SCB")) is not None:
            self._perhaps(f"{base}.weight_format")
            return Scaled(self._files, key, rows, self._blocks(key, rows, None), divisor=127)
        if self._files.dtype(key) == torch.int8 and self._declared.method != "compressed-tensors":
            raise self._failed(f"has int8 numbers {key}, which its quantisation {self._declared.method!r} does not")
        scale = self._take(f"{key}_scale_inv", f"{key}_scale", f"{base}.scale", f"{base}.qscale_weight")
        zero = self._perhaps(f"{key}_zero_point")
        return Scaled(self._files, key, scale, self._blocks(key, scale, self._declared.block), zero=zero)

    def _blocks(self, key: str, scale: str, declared: tuple[int, int] | None) -> tuple[int, ...]:
        """Numbers that share a scale, along every dimension."""
        shape, counts = self._files.shape(key), self._files.shape(scale)
        if torch.Size(counts).numel() == 1:
            return shape
        sizes = (*(0,) * (len(shape) - 2), *(declared or (0, 0)))[-len(shape) :]
        counts = (*counts, *(1,) * (len(shape) - len(counts)))
        blocks = [self._block(*each) for each in zip(shape, counts, sizes, strict=False)]
        if len(counts) != len(shape) or not all(blocks):
            raise self._failed(
                f"has scales {scale} of shape {list(self._files.shape(scale))} that do not fit {key} of shape "
                f"{list(shape)}"
            )
        return tuple(blocks)

    @staticmethod
    def _block(size: int, count: int, declared: int) -> int:
        """How many of ``size`` share one of ``count`` scales; 0: they do not fit."""
        if declared > 0 and -(-size // declared) == count:
            return declared
        return size // count if count and size % count == 0 else 0

    def _groups(self, base: str) -> Part:
        kind: type[GroupsByInputs] | type[GroupsByOutputs]
        kind = GroupsByInputs if self._declared.method == "gptq" else GroupsByOutputs
        words, zeros, scales = (self._take(f"{base}.{name}") for name in ("qweight", "qzeros", "scales"))
        outputs, packed = self._files.shape(scales)[1], self._files.shape(zeros)[1]
        bits = 32 * packed // outputs
        if bits not in (2, 4, 8) or bits * outputs != 32 * packed:
            raise self._failed(f"has {packed} words of zero points in {zeros} for {outputs} outputs: 2, 4 or 8 bits do")
        order = self._perhaps(f"{base}.g_idx")
        inputs = self._files.shape(words)[0] * (32 // bits if kind is GroupsByInputs else 1)
        group = self._block(inputs, self._files.shape(scales)[0], self._declared.group_size)
        if order is None and not group:
            raise self._failed(f"has {self._files.shape(scales)[0]} groups in {scales} for {inputs} inputs")
        shape = (outputs, inputs)
        return kind(self._files, words, zeros, scales, order, shape, bits, group, self._declared.zero_offset)

    def _packed(self, base: str) -> Part:
        words, scales, size = (self._take(f"{base}.weight_{name}") for name in ("packed", "scale", "shape"))
        shape = tuple(self._files.read(size, ()).tolist())
        packed = self._files.shape(words)[1]
        bits = next((bits for bits in (4, 8, 2) if -(-shape[1] * bits // 32) == packed), 0)
        if not bits:
            raise self._failed(f"has {packed} words a row in {words} for {shape[1]} inputs: 2, 4 or 8 bits do")
        zeros, order = self._perhaps(f"{base}.weight_zero_point"), self._perhaps(f"{base}.weight_g_idx")
        count = self._files.shape(scales)[1]
        group = -(-shape[1] // count)
        return Offset(self._files, words, zeros, scales, order, shape, bits, group)

    def _coded(self, name: str, state: str) -> Part:
        described = json.loads(bytes(self._files.read(state, ()).tolist()))
        parts = [self._take(f"{name}.{leaf}") for leaf in ("absmax", "quant_map")]
        nested = [f"{name}.{leaf}" for leaf in ("nested_absmax", "nested_quant_map")]
        if "nested_offset" in described:
            parts += [self._take(each) for each in nested]
        self.used.add(name)
        return Coded(self._files, name, parts, described)


class Scaled:
    """Numbers times the scales of blocks of them (see :class:`.files.Part`)."""

    def __init__(
        self, files: Files, key: str, scale: str, block: tuple[int, ...], divisor: int = 1, zero: str | None = None
    ) -> None:
        self._files, self._key, self._scale, self._block, self._divisor = files, key, scale, block, divisor
        self._zero = zero
        self.shape = files.shape(key)

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`.files.Part`."""
        values = self._files.read(self._key, bounds).float()
        if self._zero is not None:
            values = values - self._spread(self._zero, bounds)
        values *= self._spread(self._scale, bounds)
        return values if self._divisor == 1 else values.div_(self._divisor)

    def _spread(self, key: str, bounds: Bounds) -> torch.Tensor:
        """The scales of a slice, float32, of its shape or broadcast to it."""
        counts = self._files.shape(key)
        if torch.Size(counts).numel() == 1:
            return _scales(self._files.read(key, whole(counts))).reshape((1,) * len(bounds))
        needed = [(start // size, -(-stop // size)) for (start, stop), size in zip(bounds, self._block, strict=True)]
        found = _scales(self._files.read(key, tuple(needed[: len(counts)])))
        found = found.reshape(*found.shape, *(1,) * (len(bounds) - len(counts)))
        for dim, ((start, stop), size) in enumerate(zip(bounds, self._block, strict=True)):
            if size > 1 and found.shape[dim] > 1:
                found = found.repeat_interleave(size, dim).narrow(dim, start - start // size * size, stop - start)
        return found


class GroupsByInputs:
    """GPTQ's: words pack inputs."""

    def __init__(
        self,
        files: Files,
        words: str,
        zeros: str,
        scales: str,
        order: str | None,
        shape: tuple[int, ...],
        bits: int,
        group: int,
        zero_offset: int,
    ) -> None:
        self._files, self._words, self._zeros, self._scales, self._order = files, words, zeros, scales, order
        self._bits, self._group, self._zero_offset = bits, group, zero_offset
        self.shape = shape

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`.files.Part`."""
        outputs, inputs = bounds
        values = self._values(outputs, inputs)
        group = _groups(self._files, self._order, inputs, self._group).to(values.device)
        low, high = int(group.min()), int(group.max()) + 1
        scales = self._files.read(self._scales, ((low, high), outputs)).float()
        zeros = self._by_outputs(self._zeros, (low, high), outputs)
        zeros = (zeros + self._zero_offset) & (2**self._bits - 1)
        group -= low
        weight: torch.Tensor = (values - zeros[group]) * scales[group]
        return weight.T.contiguous()

    def _values(self, outputs: tuple[int, int], inputs: tuple[int, int]) -> torch.Tensor:
        """int32 [inputs, outputs]."""
        return _unpacked(self._files, self._words, (inputs, outputs), 0, self._bits)

    def _by_outputs(self, key: str, rows: tuple[int, int], outputs: tuple[int, int]) -> torch.Tensor:
        """int32 [rows, outputs] of words that pack outputs."""
        return _unpacked(self._files, key, (rows, outputs), 1, self._bits)


class GroupsByOutputs(GroupsByInputs):
    """AWQ's: words pack outputs, not in their order."""

    def _values(self, outputs: tuple[int, int], inputs: tuple[int, int]) -> torch.Tensor:
        return self._by_outputs(self._words, inputs, outputs)

    def _by_outputs(self, key: str, rows: tuple[int, int], outputs: tuple[int, int]) -> torch.Tensor:
        low, high = outputs[0] // 8 * 8, -(-outputs[1] // 8) * 8
        found = _unpacked(self._files, key, (rows, (low, high)), 1, self._bits)
        ordered = found.reshape(len(found), -1, 8)[:, :, list(_AWQ_PLACES)].flatten(1)
        return ordered.narrow(1, outputs[0] - low, outputs[1] - outputs[0])


class Offset:
    """compressed-tensors' packed integers: stored positive; so are zero points, packed along outputs."""

    def __init__(
        self,
        files: Files,
        words: str,
        zeros: str | None,
        scales: str,
        order: str | None,
        shape: tuple[int, ...],
        bits: int,
        group: int,
    ) -> None:
        self._files, self._words, self._zeros, self._scales, self._order = files, words, zeros, scales, order
        self._bits, self._group = bits, group
        self.shape = shape

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`.files.Part`."""
        outputs, inputs = bounds
        values = _unpacked(self._files, self._words, (outputs, inputs), 1, self._bits)
        group = _groups(self._files, self._order, inputs, self._group).to(values.device)
        low, high = int(group.min()), int(group.max()) + 1
        scales = self._files.read(self._scales, (outputs, (low, high))).float()
        group -= low
        zeros: torch.Tensor | int = 2 ** (self._bits - 1)
        if self._zeros is not None:
            if self._files.dtype(self._zeros) == torch.int32:
                zeros = _unpacked(self._files, self._zeros, (outputs, (low, high)), 0, self._bits)
            else:
                zeros = self._files.read(self._zeros, (outputs, (low, high))).int() + zeros
            zeros = zeros[:, group]
        return (values - zeros) * scales[:, group]


class Microscaled:
    """MXFP4 of fused experts, stored [..., outputs, inputs / 32, 16], which are [..., inputs, outputs]."""

    def __init__(self, files: Files, blocks: str, scales: str) -> None:
        self._files, self._blocks, self._scales = files, blocks, scales
        *first, outputs, groups, _ = files.shape(blocks)
        self.shape = (*first, groups * 32, outputs)

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`.files.Part`."""
        *first, (start, stop), outputs = bounds
        groups = (start // 32, -(-stop // 32))
        pairs = self._files.read(self._blocks, (*first, outputs, groups, (0, 16))).long()
        code = torch.tensor(_E2M1, device=pairs.device)
        values = code[torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)]
        exponents = self._files.read(self._scales, (*first, outputs, groups))
        values = (values * _scales(exponents).unsqueeze(-1)).flatten(-2)
        return values[..., start - groups[0] * 32 : stop - groups[0] * 32].transpose(-1, -2).contiguous()


class Coded:
    """bitsandbytes' numbers of four bits, which stand for values of a table, flat in blocks."""

    def __init__(self, files: Files, key: str, parts: list[str], state: Mapping[str, Any]) -> None:
        self._files, self._key, self._parts = files, key, parts
        self._block = int(state["blocksize"])
        self._nested_block, self._offset = int(state.get("nested_blocksize", 0)), float(state.get("nested_offset", 0))
        self.shape = tuple(state["shape"])

    def read(self, bounds: Bounds) -> torch.Tensor:
        """See :class:`.files.Part`."""
        (first, last), *others = bounds
        row = torch.Size(self.shape[1:]).numel()
        start, stop = first * row, last * row
        stored = self._files.shape(self._key)
        if self._files.dtype(self._key) == torch.uint8 and stored[1:] == (1,):
            pairs = self._files.read(self._key, ((start // 2, -(-stop // 2)), (0, 1))).flatten().long()
        else:
            # packed into another dtype
            pairs = self._files.read(self._key, whole(stored)).view(torch.uint8).flatten()
            pairs = pairs[start // 2 : -(-stop // 2)].long()
        codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten()[start % 2 :][: stop - start]
        absmax, code, *nested = (self._files.read(key, ()) for key in self._parts)
        if nested:
            coarse, table = nested
            factors = table[absmax.long()] * coarse.repeat_interleave(self._nested_block)[: len(absmax)] + self._offset
        else:
            factors = absmax
        block = torch.arange(start, stop, device=codes.device) // self._block
        values: torch.Tensor = (code[codes].float() * factors.float()[block]).reshape(-1, *self.shape[1:])
        for dim, (low, high) in enumerate(others, 1):
            values = values.narrow(dim, low, high - low)
        return values


def _unpacked(files: Files, key: str, bounds: Bounds, dim: int, bits: int) -> torch.Tensor:
    """Numbers of a matrix whose words hold several along ``dim``, lowest bits first: int32 of the shape of the slice.

    Args:
        bounds: of the numbers.
    """
    each = 32 // bits
    start, stop = bounds[dim]
    wanted = list(bounds)
    wanted[dim] = (start // each, -(-stop // each))
    words = files.read(key, tuple(wanted)).int().unsqueeze(dim + 1)
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    numbers: torch.Tensor = (words >> (shifts[:, None] if dim == 0 else shifts)) & (2**bits - 1)
    return numbers.flatten(dim, dim + 1).narrow(dim, start % each, stop - start)


def _groups(files: Files, order: str | None, inputs: tuple[int, int], group: int) -> torch.Tensor:
    """The group of each input: int64 [inputs]."""
    return torch.arange(*inputs) // group if order is None else files.read(order, (inputs,)).long()


def _scales(stored: torch.Tensor) -> torch.Tensor:
    """float32; bytes are exponents of two, as e8m0 has them."""
    return torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()
