"""Parts of vision towers run as fused kernels: norms, gated layers, rotated attention, patches as a matrix product.

A tower of transformers spends more time between its matrix products than in them: a norm is seven passes over the
hidden states, a rotation sixteen. Whatever part has a shape known here is replaced, its weights joined, and the new
part must give on random input what the old one gives; where it does not, the old one stays.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ...kernels.activation import gated
from ...kernels.norm import rms_norm
from ...kernels.packed_attention import packed_attention
from ...kernels.rope import rotate_and_store

logger = logging.getLogger(__name__)

_ALIGNMENT = 128
"""Columns of a gated layer are filled up to a multiple of this: cuBLAS has no fast kernels for odd widths."""
_TRIAL_TOKENS = 24
_KINDS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "GELU": "gelu", "GELUActivation": "gelu"}


def fuse_tower(tower: nn.Module) -> Counter[str]:
    """Replace parts of a tower in place.

    Args:
        tower: of transformers, with its weights, in evaluation mode.

    Returns:
        How many parts of each kind were replaced.
    """
    done: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for path, module in list(tower.named_modules()):
        if isinstance(module, _Part):
            continue
        for make in (_Norm.of, _GatedLayer.of, _Patches.of, _Attention.of):
            new = make(module)
            if new is None:
                continue
            if new.agrees(module):
                tower.set_submodule(path, new)
                done[new.kind] += 1
            else:
                kept[new.kind] += 1
    if done or kept:
        logger.info(
            "%s: fused %s%s",
            type(tower).__name__,
            ", ".join(f"{count} {kind}" for kind, count in done.items()) or "nothing",
            "".join(f"; {count} {kind} compute something else and stay" for kind, count in kept.items()),
        )
    return done


class _Part(nn.Module):
    """A fused part."""

    kind: str

    def trial(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Arguments with which old and new are compared."""
        raise NotImplementedError

    def agrees(self, old: nn.Module) -> bool:
        """Whether it gives what the old part gives, but for rounding."""
        positional, named = self.trial()
        with torch.inference_mode():
            try:
                expected = old(*positional, **named)
            except Exception as error:  # noqa: BLE001 - it takes other arguments, so it is something else
                logger.debug("%s cannot be tried: %s", type(old).__name__, error)
                return False
            found = self(*positional, **named)
        if not isinstance(expected, torch.Tensor) or expected.shape != found.shape:
            return False
        scale = float(expected.float().abs().max())
        # a few roundings of the dtype, relative to the largest value
        allowed = scale * (1e-5 if expected.dtype == torch.float32 else 8 * torch.finfo(expected.dtype).eps)
        return bool((found.float() - expected.float()).abs().max() <= allowed)


class _Norm(_Part):
    """RMS norm over the last dimension."""

    kind = "norms"

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    @classmethod
    def of(cls, module: nn.Module) -> _Norm | None:
        """Of a module that is called a norm and has one weight."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if "RMSNorm" not in type(module).__name__ or weight is None or eps is None or weight.dim() != 1:
            return None
        return cls(weight.data, float(eps))

    def trial(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        return (_random((_TRIAL_TOKENS, len(self.weight)), self.weight),), {}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rms_norm(rows, self.weight, self.eps)[0].view(hidden_states.shape)


class _GatedLayer(_Part):
    """act(gate(x)) * up(x), then down: two matrix products."""

    kind = "gated layers"

    def __init__(self, module: Any, activation: str) -> None:
        super().__init__()
        gate, up, down = module.gate_proj, module.up_proj, module.down_proj
        self.activation = activation
        width = gate.out_features
        more = -width % _ALIGNMENT
        # gate and up of the columns that fill up are 0, and so is their product
        self.gate_up = _frozen(torch.cat([_padded(gate.weight, more, 0), _padded(up.weight, more, 0)]))
        self.down = _frozen(_padded(down.weight, more, 1))
        self.gate_up_bias = self.down_bias = None
        if gate.bias is not None:
            self.gate_up_bias = _frozen(torch.cat([_padded(gate.bias, more, 0), _padded(up.bias, more, 0)]))
        if down.bias is not None:
            self.down_bias = _frozen(down.bias.data)

    @classmethod
    def of(cls, module: nn.Module) -> _GatedLayer | None:
        """Of a module with just these linear layers and a known activation."""
        children = dict(module.named_children())
        layers = [children.pop(name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(type(layer) is nn.Linear for layer in layers) or len(children) > 1:
            return None
        activation = _KINDS.get(type(getattr(module, "act_fn", None)).__name__)
        biases = {layer.bias is None for layer in layers[:2] if isinstance(layer, nn.Linear)}
        return cls(module, activation) if activation is not None and len(biases) == 1 else None

    def trial(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        return (_random((_TRIAL_TOKENS, self.gate_up.shape[1]), self.gate_up),), {}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        inner = gated(linear(rows, self.gate_up, self.gate_up_bias), self.activation)
        return linear(inner, self.down, self.down_bias).view(*hidden_states.shape[:-1], -1)


class _Patches(_Part):
    """A convolution whose steps are as long as its kernel, over patches that are cut already."""

    kind = "patch embeddings"

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        # bias and position in the tower stay what they were: only the convolution itself is replaced
        self.weight = _frozen(convolution.weight.data.flatten(1))
        self.bias = None if convolution.bias is None else _frozen(convolution.bias.data)
        self.kernel = tuple(convolution.weight.shape[1:])

    @classmethod
    def of(cls, module: nn.Module) -> _Patches | None:
        """Of a three-dimensional convolution without overlap."""
        if type(module) is not nn.Conv3d or module.groups != 1 or module.stride != module.kernel_size:
            return None
        return cls(module) if module.padding == (0, 0, 0) and module.dilation == (1, 1, 1) else None

    def trial(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        return (_random((_TRIAL_TOKENS, *self.kernel), self.weight),), {}

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[P, C, frames, height, width], each as large as the kernel -> [P, H, 1, 1, 1].

        Raises:
            ValueError: patches of another size.
        """
        if tuple(patches.shape[1:]) != self.kernel:
            raise ValueError(f"patches of shape {tuple(patches.shape[1:])}, not {self.kernel}")
        return linear(patches.flatten(1), self.weight, self.bias)[:, :, None, None, None]


class _Attention(_Part):
    """Attention of packed sequences with one product for query, key and value, and rotated heads."""

    kind = "attention layers"

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.qkv, self.proj = module.qkv, module.proj
        self.num_heads = int(module.num_heads)
        self.scaling = float(module.scaling)

    @classmethod
    def of(cls, module: nn.Module) -> _Attention | None:
        """Of the Qwen-VL line's attention: nothing but ``qkv`` and ``proj``."""
        children = dict(module.named_children())
        if set(children) != {"qkv", "proj"} or not (hasattr(module, "num_heads") and hasattr(module, "scaling")):
            return None
        qkv, proj = children["qkv"], children["proj"]
        if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
            return None
        return cls(module) if qkv.out_features == 3 * proj.in_features else None

    def trial(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        weight = self.qkv.weight
        angles = _random((_TRIAL_TOKENS, self.proj.in_features // self.num_heads // 2), weight).float()
        angles = torch.cat([angles, angles], dim=-1)
        bounds = torch.tensor([0, 5, _TRIAL_TOKENS], dtype=torch.int32, device=weight.device)
        hidden = _random((_TRIAL_TOKENS, self.qkv.in_features), weight)
        tables = (angles.cos(), angles.sin())
        return (hidden,), {"cu_seqlens": bounds, "position_embeddings": tables, "max_seqlen": _TRIAL_TOKENS - 5}

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        max_seqlen: int | torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """[T, H] of sequences from cu_seqlens[b] to cu_seqlens[b + 1]; cos and sin [T, D], their halves alike."""
        qkv = self.qkv(hidden_states)
        tokens, width = hidden_states.shape[0], self.proj.in_features // self.num_heads
        cos, sin = (table[:, : width // 2].float().contiguous() for table in position_embeddings)
        # pages of one token each: keys and values in the order of the tokens
        pages = qkv.new_empty(2, tokens, self.num_heads, 1, width)
        slots = torch.arange(tokens, device=qkv.device)
        query = rotate_and_store(
            qkv, cos, sin, pages[0], pages[1], slots, num_heads=self.num_heads, num_kv_heads=self.num_heads
        )
        key, value = pages[0, :, :, 0], pages[1, :, :, 0]
        longest = int(max_seqlen) if isinstance(max_seqlen, int) else _longest(cu_seqlens)
        out = packed_attention(query, key, value, cu_seqlens.to(torch.int32), longest, self.scaling)
        result: torch.Tensor = self.proj(out.reshape(tokens, -1))
        return result


class _LongestSequence:
    """Length of the longest sequence, read from the device once for each tensor of bounds."""

    def __init__(self) -> None:
        self._known: tuple[torch.Tensor, int] | None = None
        self._other: tuple[torch.Tensor, int] | None = None

    def __call__(self, bounds: torch.Tensor) -> int:
        for known in (self._known, self._other):
            if known is not None and known[0] is bounds:
                return known[1]
        found = (bounds, int((bounds[1:] - bounds[:-1]).max()))
        # windows and whole pictures take turns
        self._known, self._other = found, self._known
        return found[1]


_longest: Callable[[torch.Tensor], int] = _LongestSequence()


def _random(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _padded(tensor: torch.Tensor, more: int, dim: int) -> torch.Tensor:
    """With ``more`` zeros at the end of a dimension."""
    shape = list(tensor.shape)
    shape[dim] = more
    return torch.cat([tensor.data, tensor.new_zeros(shape)], dim) if more else tensor.data
