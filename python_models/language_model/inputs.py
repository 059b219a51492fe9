"""Input tensors of ``language_model`` -> a checked prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..contract.errors import ErrorKind, TriptychError
from ..contract.plan import MediaItem, Plan
from .engine.request import Prompt
from .runner.cross import CrossLayout, CrossMedia
from .runner.rope import RopeSwitch
from .runner.step import MediaRows
from .runs import settle

STAGE = "language_model"
_NOTHING: Mapping[str, int | None] = {}
_EMBEDDINGS = {"vision": "vision_embeddings", "audio": "audio_embeddings"}


def names(inputs: Mapping[str, Any], tensor: str) -> list[str]:
    """The request ids in a control tensor, if it is there."""
    return [item.decode() if isinstance(item, bytes) else str(item) for item in inputs.get(tensor, ())]


def read_plan(inputs: Mapping[str, Any]) -> Plan:
    """The ``plan`` tensor.

    Raises:
        TriptychError: it is missing, or no valid plan.
    """
    if "plan" not in inputs:
        raise _wrong("input_ids came without a plan")
    try:
        plan = Plan.from_json(inputs["plan"][0])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise _wrong(f"the plan cannot be read: {type(error).__name__}: {error}") from None
    return plan


def read_prompt(
    inputs: Mapping[str, Any],
    plan: Plan,
    num_axes: int,
    hidden_size: int,
    vocab_size: int,
    bidirectional: frozenset[str] = frozenset(),
    token_extras: Mapping[str, int | None] = _NOTHING,
    rope_switch: RopeSwitch | None = None,
    position_step: int = 1,
    cross: CrossLayout | None = None,
) -> Prompt:
    """Token ids, positions and embedding rows, checked against each other.

    Args:
        inputs: the stage's inputs.
        plan: see :func:`read_plan`.
        num_axes: axes of position ids that the decoder takes.
        hidden_size: columns of the token embeddings.
        vocab_size: tokens that have an embedding.
        bidirectional, token_extras: see :class:`~..families.base.Decoder`.
        rope_switch, position_step, cross: of the decoder.

    Raises:
        TriptychError: STAGE_FAILED, saying which of them do not fit together.
    """
    # copies: the server may take its buffers back
    token_ids = np.array(inputs["input_ids"], dtype=np.int64).reshape(-1)
    length = token_ids.shape[0]
    if "position_ids" not in inputs:
        raise _wrong("input_ids came without position_ids")
    position_ids = np.array(inputs["position_ids"], dtype=np.int64)
    if position_ids.shape != (num_axes, length):
        raise _wrong(f"position_ids have shape {position_ids.shape}, but {(num_axes, length)} is needed")
    plan_items = plan.items
    runs = inputs.get("vision_runs")
    if runs is not None or any(item.runs for item in plan_items):
        try:
            token_ids, plan_items = settle(token_ids, plan_items, [] if runs is None else np.array(runs).tolist())
        except ValueError as error:
            raise _wrong(str(error)) from None
    media = []
    across: CrossMedia | None = None
    is_text = np.ones(length, dtype=np.bool_)
    for item in plan.items:
        if item.encoder not in _EMBEDDINGS:
            raise _wrong(f"the plan names an unknown encoder {item.encoder!r}")
        if item.modality not in ("image", "video", "audio"):
            raise _wrong(f"the plan names an unknown modality {item.modality!r}")
    for encoder, tensor in _EMBEDDINGS.items():
        items = [item for item in plan_items if item.encoder == encoder]
        rows = inputs.get(tensor)
        if not items and rows is None:
            continue
        if any(item.cross is not None for item in items):
            if cross is None:
                raise _wrong("the plan has media for cross-attention, but the decoder has no such layers")
            # these tokens have embeddings of their own, which may lie behind those of the vocabulary
            _places(items, length, is_text)
            across = _across(items, rows, tensor, cross, length)
            continue
        positions = _places(items, length, is_text)
        media.append(_rows(positions, rows, encoder, tensor, len(items), hidden_size))
    text_ids = token_ids[is_text]
    if text_ids.size and (int(text_ids.min()) < 0 or int(text_ids.max()) >= vocab_size):
        raise _wrong(
            f"input_ids hold {int(text_ids.min())} to {int(text_ids.max())}, but token ids are 0 to {vocab_size - 1}"
        )
    spans = sorted(span for item in plan_items if item.modality in bidirectional for span in item.spans)
    position_ids, generated = _with_extras(position_ids, plan.extras, token_extras)
    switch_at = None
    if rope_switch is not None:
        long = int(length > rope_switch.length)
        position_ids = np.concatenate([position_ids, np.full((1, length), long)])
        generated = (*generated, long)
        if rope_switch.recompute and not long:
            switch_at = rope_switch.length
    return Prompt(
        token_ids,
        position_ids,
        plan.rope_delta,
        plan_items,
        tuple(media),
        tuple(spans),
        generated,
        switch_at,
        position_step,
        across,
    )


def _with_extras(
    position_ids: NDArray[np.int64], extras: Mapping[str, Any], known: Mapping[str, int | None]
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """The extras as further axes of position ids [axes, L], and their values for generated tokens."""
    if unknown := extras.keys() - known:
        raise _wrong(f"the plan has extras that the decoder does not know: {', '.join(sorted(unknown))}")
    if not known:
        return position_ids, ()
    length = position_ids.shape[1]
    rows, generated = [position_ids], []
    for name, later in known.items():
        given = extras.get(name, later)
        values = np.array(given if isinstance(given, list) else [given] * length)
        if values.shape != (length,) or values.dtype.kind != "i":
            raise _wrong(f"the plan's {name} must be an integer, or one for each of the {length} tokens")
        rows.append(values[None].astype(np.int64))
        generated.append(int(values[-1]) if later is None else later)
    return np.concatenate(rows), tuple(generated)


def _places(items: list[MediaItem], length: int, is_text: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Prompt positions of the rows of ``items``, in row order; marks them as taken in ``is_text``."""
    parts = []
    for item in items:
        for start, end in item.spans:
            if not 0 <= start < end <= length or not is_text[start:end].all():
                raise _wrong(
                    f"the plan puts {item.modality} rows at tokens {start} to {end} of {length}, or twice there"
                )
            is_text[start:end] = False
            parts.append(np.arange(start, end, dtype=np.int64))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _rows(
    positions: NDArray[np.int64], value: Any, encoder: str, tensor: str, num_items: int, hidden_size: int
) -> MediaRows:
    wanted = positions.shape[0]
    if value is None:
        raise _wrong(
            f"the plan has {num_items} item(s) with {wanted} rows of the {encoder} encoder, but {tensor} is absent"
        )
    rows = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
    if rows.dim() != 2 or rows.shape[0] != wanted:
        raise _wrong(f"{tensor} has shape {tuple(rows.shape)}, but the plan's {num_items} item(s) need {wanted} rows")
    if rows.shape[1] < hidden_size or rows.shape[1] % hidden_size or not rows.is_floating_point():
        raise _wrong(
            f"{tensor} has {rows.shape[1]} columns of {rows.dtype}, but a multiple of {hidden_size} floats is needed"
        )
    order = np.argsort(positions, kind="stable")
    if not np.array_equal(order, np.arange(wanted)):
        positions, rows = positions[order], rows[torch.from_numpy(order).to(rows.device)]
    return MediaRows(positions, rows)


def _across(items: list[MediaItem], value: Any, tensor: str, layout: CrossLayout, length: int) -> CrossMedia:
    crossing = [item.cross for item in items if item.cross is not None]
    if len(crossing) != len(items) or value is None:
        raise _wrong(f"the plan has {len(items)} media, not all for cross-attention, or {tensor} is absent")
    rows = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
    try:
        return CrossMedia(layout, rows, crossing, length)
    except ValueError as error:
        raise _wrong(f"{tensor}: {error}") from None


def _wrong(message: str) -> TriptychError:
    return TriptychError(ErrorKind.STAGE_FAILED, f"bad input of the language model: {message}", None, STAGE)
