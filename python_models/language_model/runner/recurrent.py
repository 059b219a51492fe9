"""State of a fixed size that some layers keep of a request, instead of keys and values.

State-space layers (Mamba-2, Dao and Gu 2024, arXiv:2405.21060), gated delta nets (Yang et al. 2024, arXiv:2412.06464)
and short convolutions read a prompt in order and fold it into one state. A step's flat batch is therefore cut by
request here, and each layer of transformers is run with the state of its request: all slices of one token together,
longer ones each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ...contract.errors import ErrorKind, TriptychError
from .step import Slice

States = dict[str, torch.Tensor]
"""What a layer keeps of B requests: tensors [B, ...] by name (inputs of convolutions, recurrent states)."""
Run = Callable[[torch.Tensor, States | None], tuple[torch.Tensor, States]]
"""A layer: hidden states [B, n, H] and the states before them (None for none) -> [B, n, H], the states after them."""

_CACHE_ARGUMENT = {
    "Mamba2Mixer": "cache_params",
    "MambaMixer": "cache_params",
    "BambaMixer": "cache_params",
    "FalconH1Mixer": "cache_params",
    "MoeHybridMambaLayer": "cache_params",
    "GatedDeltaNet": "cache_params",
    "ShortConv": "past_key_values",
}
"""End of a layer's class name in transformers -> the argument of its forward that takes its state."""


@dataclass(frozen=True)
class StateShape:
    """What a layer keeps of one request: shape and dtype of each tensor, by name."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def nbytes(self) -> int:
        """Of one request."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())


class StateContext(Protocol):
    """The states of the requests of one step, as a layer sees them."""

    def recur(self, layer: int, hidden: torch.Tensor, run: Run) -> torch.Tensor:
        """Hidden states [T, H] of all requests through ``run``, each with its own state -> [T, H]."""


def attach(model: nn.Module) -> None:
    """Have every recurrent layer of a decoder of transformers take its state from the step that is computed."""
    for module in model.modules():
        for ending, argument in _CACHE_ARGUMENT.items():
            if type(module).__name__.endswith(ending):
                # where the decoder was in use before, its own method and not our stand-in for it
                own = type(module).forward.__get__(module)
                module.forward = partial(_forward, module, own, argument)


def _forward(
    module: Any, own: Callable[..., torch.Tensor], argument: str, hidden_states: torch.Tensor, **options: Any
) -> torch.Tensor:
    """In place of a layer's ``forward``; ``own`` is that one."""
    context = options.pop("context", None)
    if context is None:
        return own(hidden_states, **options)

    def run(hidden: torch.Tensor, states: States | None) -> tuple[torch.Tensor, States]:
        cache = _LayerCache(states)
        return own(hidden, **{argument: cache}), cache.states

    out: torch.Tensor = context.states.recur(module.layer_idx, hidden_states[0], run)
    return out[None]


class _LayerCache:
    """What recurrent layers of transformers use of its ``Cache``."""

    def __init__(self, states: States | None) -> None:
        self.states: States = {} if states is None else dict(states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.states.get(f"conv{state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self.states.get(f"recurrent{state_idx}")

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return bool(self.states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, new: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int = 0, **_: Any
    ) -> torch.Tensor:
        """Inputs of the convolution [B, C, n] -> those before them too; the last ones are kept."""
        before = self.states.get(f"conv{state_idx}")
        if before is None:
            before = new.new_zeros(*new.shape[:-1], conv_kernel_size)
        whole = torch.cat([before, new], dim=-1)
        self.states[f"conv{state_idx}"] = whole[..., -conv_kernel_size:]
        return whole

    def update_recurrent_state(self, new: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> torch.Tensor:
        self.states[f"recurrent{state_idx}"] = new
        return new


class StateProbe:
    """Learns what layers keep; every token of the batch belongs to one request."""

    def __init__(self) -> None:
        self.shapes: dict[int, StateShape] = {}

    def recur(self, layer: int, hidden: torch.Tensor, run: Run) -> torch.Tensor:
        """See :class:`StateContext`."""
        out, states = run(hidden[None], None)
        self.shapes[layer] = StateShape({name: (tuple(s.shape[1:]), s.dtype) for name, s in states.items()})
        return out[0]


class StatePool:
    """The states of all running requests, and saved ones that later requests begin with.

    Rows of every tensor: one for each slot, one for each saved state, and a last one that is nobody's.
    """

    def __init__(self, shapes: Mapping[int, StateShape], num_slots: int, num_saved: int, device: str) -> None:
        """Make it, filled with zeros.

        Raises:
            TriptychError: there is not that much memory.
        """
        self.num_slots = num_slots
        self.num_saved = num_saved
        self.device = torch.device(device)
        rows = num_slots + num_saved + 1
        self.nbytes = rows * sum(shape.nbytes for shape in shapes.values())
        try:
            self.layers = {
                layer: {
                    name: torch.zeros(rows, *size, dtype=dtype, device=device)
                    for name, (size, dtype) in shape.tensors.items()
                }
                for layer, shape in shapes.items()
            }
        except (RuntimeError, MemoryError) as error:
            raise TriptychError(
                ErrorKind.STAGE_FAILED,
                f"no memory for the state of recurrent layers of {num_slots} requests and {num_saved} saved ones "
                f"({self.nbytes / 2**20:.0f} MiB): lower max_mamba_cache_size ({error})",
                "settings.max_mamba_cache_size",
                "language_model",
            ) from error

    def row(self, slot: int) -> int:
        """Of a slot; -1 is nobody's."""
        return slot if slot >= 0 else self.num_slots + self.num_saved

    def saved_row(self, number: int) -> int:
        """Of a saved state."""
        return self.num_slots + number


@dataclass(frozen=True)
class _Piece:
    """Tokens [start, end) of the flat batch, from the state in row ``source`` (-1: none yet) to that in ``target``."""

    start: int
    end: int
    source: int
    target: int
    saved: int = -1


class StateStep:
    """The :class:`StateContext` of one step."""

    def __init__(self, pool: StatePool, slices: Sequence[Slice], num_singles: int) -> None:
        """Args: the states; slices in the order they are computed, ``num_singles`` of one token first."""
        self._pool = pool
        pieces: list[list[_Piece]] = []
        at = 0
        for part in slices:
            row = pool.row(part.slot)
            source = pool.saved_row(part.load) if part.load >= 0 else row if part.start else -1
            own: list[_Piece] = []
            begin = at
            for count, number in (*part.saves, (len(part), -1)):
                end = at + count
                # saved at the very end of the slice: nothing follows
                if end > begin or not own:
                    saved = pool.saved_row(number) if number >= 0 else -1
                    own.append(_Piece(begin, end, source, row, saved))
                    begin, source = end, row
            pieces.append(own)
            at += len(part)
        self._num_singles = num_singles
        self._pieces = [piece for own in pieces[num_singles:] for piece in own]
        singles = [own[0] for own in pieces[:num_singles]]
        if singles:
            fresh = [piece.source < 0 for piece in singles]
            saving = [k for k, piece in enumerate(singles) if piece.saved >= 0]
            numbers = [piece.target for piece in singles] + [max(piece.source, 0) for piece in singles]
            numbers += saving + [singles[k].saved for k in saving]
            # one copy to the device
            sent = torch.tensor(numbers, dtype=torch.int64).to(pool.device, non_blocking=True)
            parts = torch.split(sent, [num_singles, num_singles, len(saving), len(saving)])
            self._targets, self._sources, self._saving, self._saved = parts
            self._fresh = torch.tensor(fresh).to(pool.device, non_blocking=True) if any(fresh) else None

    def recur(self, layer: int, hidden: torch.Tensor, run: Run) -> torch.Tensor:
        """See :class:`StateContext`."""
        pool = self._pool.layers[layer]
        parts = []
        if self._num_singles:
            states = {name: self._read(tensor) for name, tensor in pool.items()}
            out, states = run(hidden[: self._num_singles, None], states)
            for name, tensor in pool.items():
                state = states[name]
                tensor.index_copy_(0, self._targets, state.to(tensor.dtype))
                if len(self._saving):
                    tensor.index_copy_(0, self._saved, state.index_select(0, self._saving).to(tensor.dtype))
            parts.append(out[:, 0])
        for piece in self._pieces:
            # copies, because layers may write into what they are given
            row = slice(piece.source, piece.source + 1)
            before = None if piece.source < 0 else {name: tensor[row].clone() for name, tensor in pool.items()}
            out, states = run(hidden[None, piece.start : piece.end], before)
            for name, tensor in pool.items():
                tensor[piece.target] = states[name][0]
                if piece.saved >= 0:
                    tensor[piece.saved] = states[name][0]
            parts.append(out[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The states that slices of one token begin with: zeros, not what the slot's last owner left, for new ones."""
        states = tensor.index_select(0, self._sources)
        if self._fresh is not None:
            states.masked_fill_(self._fresh.view(-1, *[1] * (states.dim() - 1)), 0)
        return states
