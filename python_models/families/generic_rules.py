"""Which classes of transformers the generic adapter can split, read from the code of their forward passes.

Every step that is not on the lists here is a reason to refuse the class: a wrong answer would be worse.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_MODALITIES = ("image", "video", "audio")
# arguments of the language model that are its own business, or that the stages give it too
_PASSED = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "visual_pos_masks",
    "deepstack_visual_embeds",
    None,
}
_EMBEDDINGS = re.compile(
    r"(self\.(\w+\.)?get_input_embeddings\(\)|self\.(language_model\.)?embed_tokens)\((llm_)?input_ids\)(\.to\(.*\))?$|"
    # rows in the places of placeholders; nothing may be added to what was there
    r"inputs_embeds\.masked_scatter\((?!.*inputs_embeds\[)|"
    r"self\.(inputs_merger|get_merged_audio_embeddings)\("
)
_POSITIONS = re.compile(
    r"self\.compute_3d_position_ids\(|"
    r"torch\.arange\(inputs_embeds\.shape\[1\], device=inputs_embeds\.device\)( \+ past_seen_tokens)?$|"
    r"position_ids\.unsqueeze\(0\)$"
)
_HEAD = re.compile(r"self\.lm_head\(hidden_states(\[[^\]]*\])?\)(\.float\(\)|\.contiguous\(\))?$")
_HIDDEN = re.compile(
    r"\w*outputs?(\[0\]|\.last_hidden_state)$|"
    r"slice_logits_to_keep\((hidden_states|\w*outputs?(\[0\]|\.last_hidden_state)), logits_to_keep\)$"
)
_SOFTCAP = (
    re.compile(r"logits / [\w.]*final_logit_softcapping$"),
    re.compile(r"torch\.tanh\(logits\)$"),
    re.compile(r"logits \* [\w.]*final_logit_softcapping$"),
)


class UnfitError(Exception):
    """Why a class does not fit."""


def text_model_of(model: Any) -> Any:
    """The decoder stack of a causal language model.

    Raises:
        UnfitError: it is none that runs on embeddings and positions alone.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnfitError("it has an encoder for its text: only decoders are supported")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        raise UnfitError("it has no language model that could run alone")
    takes = inspect.signature(decoder.forward).parameters
    for name in ("inputs_embeds", "position_ids"):
        if name not in takes:
            raise UnfitError(f"its language model takes no {name}")
    if "per_layer_inputs" in takes:
        raise UnfitError("each layer of its language model takes embeddings of its own beside the first ones")
    if any("Indexer" in type(module).__name__ for module in decoder.modules()):
        raise UnfitError("its attention chooses tokens by an index of its own")
    if getattr(config.get_text_config(), "alibi", False):
        raise UnfitError("its attention knows positions by biases (ALiBi)")
    if not isinstance(getattr(config.get_text_config(), "max_position_embeddings", None), int):
        raise UnfitError("its configuration does not say how many positions it knows")
    return decoder


def multimodal_parts(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(modalities, children of the base model that towers and projectors are).

    Raises:
        UnfitError: the forward pass does more than to put rows in the places of placeholder tokens.
    """
    base, config = model.base_model, model.config
    decoder = text_model_of(model)
    child = next((name for name, module in base.named_children() if module is decoder), None)
    if child is None:
        raise UnfitError("its towers and its language model are one module")
    if getattr(config, "has_lora_adapter", False):
        raise UnfitError("its adapters (LoRA) are switched on for media only")
    modalities = tuple(
        modality
        for modality in _MODALITIES
        if hasattr(base, f"get_{modality}_features") and isinstance(_token(config, modality), int)
    )
    if not modalities:
        raise UnfitError("its configuration names no placeholder token of a medium")
    tree = _source(type(base))
    _check_call(tree, child)
    for place, value in _assignments(tree):
        target = place.partition("[")[0]
        if target == "inputs_embeds" and (place != target or not _EMBEDDINGS.match(value)):
            raise UnfitError(f"it makes its embeddings in a way of its own: {place} = {value}")
        if target == "position_ids" and not _POSITIONS.match(value):
            raise UnfitError(f"it has positions of its own: {place} = {value}")
        if target == "attention_mask":
            raise UnfitError(f"it has an attention mask of its own: {place} = {value}")
    parts = tuple(
        name for name, module in base.named_children() if name != child and next(module.parameters(), None) is not None
    )
    if not parts:
        raise UnfitError("it has no towers")
    return modalities, parts


def head_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What becomes of the head's output; None for nothing.

    Raises:
        UnfitError: the head is none of the kinds known.
    """
    if not isinstance(getattr(model, "lm_head", None), nn.Linear):
        raise UnfitError("it has no linear head lm_head")
    code = _assignments(_source(type(model)))
    steps = [value for place, value in code if place == "logits"]
    if not steps or not _HEAD.match(steps[0]):
        raise UnfitError(f"its head is called in a way of its own: {'; '.join(steps) or 'not by name'}")
    rest, text = steps[1:], model.config.get_text_config()
    for place, value in code:
        if place == "hidden_states" and not _HIDDEN.match(value):
            if value != "hidden_states / self.config.logits_scaling" or model.lm_head.bias is not None:
                raise UnfitError(f"it changes what its head takes: {value}")
            # the head is linear: after it is as good as before
            rest = ["logits / self.config.logits_scaling", *rest]
    if not rest:
        return None
    if rest == ["logits * self.logit_scale"]:
        scale = float(model.logit_scale)
        return lambda logits: logits * scale
    if len(rest) == 1 and re.match(r"logits / [\w.]*logits_scaling$", rest[0]):
        divisor = float(text.logits_scaling)
        return lambda logits: logits / divisor
    if len(rest) == len(_SOFTCAP) and all(step.match(own) for step, own in zip(_SOFTCAP, rest, strict=True)):
        cap = getattr(text, "final_logit_softcapping", None)
        return None if cap is None else lambda logits: torch.tanh(logits / cap) * cap
    raise UnfitError(f"it changes its logits: {'; '.join(rest)}")


def _token(config: Any, modality: str) -> Any:
    return getattr(config, f"{modality}_token_id", None)


def _check_call(tree: ast.AST, child: str) -> None:
    """The language model is called once, with nothing but what the stages give it."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == f"self.{child}"]
    if len(calls) != 1:
        raise UnfitError(f"its forward pass calls the language model {len(calls)} times")
    for keyword in calls[0].keywords:
        value = ast.unparse(keyword.value)
        if keyword.arg not in _PASSED:
            raise UnfitError(f"its language model takes {keyword.arg} beside embeddings and positions")
        if keyword.arg in ("attention_mask", "position_ids", "inputs_embeds") and value != keyword.arg:
            raise UnfitError(f"it gives its language model {keyword.arg} of its own: {value}")


def _assignments(tree: ast.AST) -> list[tuple[str, str]]:
    """(target, value) of every assignment, in the order of the code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            found += [(node.lineno, ast.unparse(target), ast.unparse(node.value)) for target in node.targets]
        elif isinstance(node, ast.AugAssign):
            found.append((node.lineno, f"{ast.unparse(node.target)}[+]", ast.unparse(node.value)))
    return [(target, value) for _, target, value in sorted(found)]


def _source(cls: type) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        raise UnfitError(f"the code of {cls.__name__} cannot be read") from None
