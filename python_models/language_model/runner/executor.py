"""What computes a step's hidden states: transformers' own decoder modules, or fused ones of the same meaning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from ...contract.errors import ErrorKind, TriptychError
from . import latent, rope
from .attention.modules import ATTENTION, register
from .attention.plain import attention
from .context import AttentionContext, HeadNorm, How, Rope
from .cross import CrossStep, StoredStates
from .recurrent import StateProbe, StateShape, attach

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerShape:
    """What a layer keeps of each token.

    Attributes:
        key: (Hk, D).
        value: (Hk, Dv).
        window: see :class:`~.step.KVGroup`.
        latent: the value is the beginning of the key, see :mod:`.latent`.
        shares: an earlier layer, whose keys and values it reads instead of any of its own (Gemma 3n).
    """

    key: tuple[int, int]
    value: tuple[int, int]
    window: int | None = None
    latent: bool = False
    shares: int | None = None

    @property
    def keeps(self) -> bool:
        """Whether the layer has keys and values of its own."""
        return self.key[0] > 0 and self.shares is None

    @property
    def stored(self) -> tuple[tuple[int, int], ...]:
        """What takes room: heads and width of keys, and of values where they are not part of the keys."""
        return (self.key,) if self.latent else (self.key, self.value)


NOTHING = LayerShape((0, 1), (0, 1))
"""Of a layer that keeps nothing of a token: without attention, or with attention to media."""
# "hybrid" of Falcon-H1: both, side by side
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "hybrid"})
RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "hybrid"})
# of Nemotron-H, where a feed-forward network is a layer of its own
_PLAIN_LAYERS = frozenset({"mlp", "moe"})


@dataclass(frozen=True)
class Deepstack:
    """Rows that transformers adds to the hidden states after its first layers (Qwen3-VL).

    Attributes:
        places: int64 [n], ascending indices into the flat batch.
        rows: one [n, H] for each of the first layers.
    """

    places: torch.Tensor
    rows: tuple[torch.Tensor, ...]


class Executor(Protocol):
    """A decoder, as the runner drives it."""

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """What each layer keeps of each token, in layer order."""

    @property
    def states(self) -> Mapping[int, StateShape]:
        """Recurrent layer -> what it keeps of a request."""

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""

    def embed(self, ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [T], is_media bool [T] -> [T, H]; media rows hold any value."""

    def forward(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        context: AttentionContext,
        deepstack: Deepstack | None,
    ) -> torch.Tensor:
        """Hidden states [T, H], after the final norm.

        Args:
            embeddings: [T, H].
            position_ids: int64 [axes, T]; see :func:`token_axes` for those that are no positions.
            context: the step.
            deepstack: None where no rows are added.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, V]."""


class DecoderModel(Protocol):
    """What an executor is made of; see ``families.base.Decoder`` for the meaning of the attributes."""

    @property
    def text_model(self) -> nn.Module:
        """Decoder stack of transformers."""

    @property
    def lm_head(self) -> nn.Module:
        """[N, H] -> logits [N, V]."""

    @property
    def embed(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Token ids int64 [T], is_media bool [T] -> [T, H]."""

    @property
    def config(self) -> Any:
        """Text config of transformers."""

    @property
    def num_axes(self) -> int:
        """Axes of position ids, without token extras."""

    @property
    def token_extras(self) -> Mapping[str, int | None]:
        """What it needs to know of each token beside its position."""

    @property
    def token_arguments(self) -> Callable[[torch.Tensor], Mapping[str, torch.Tensor]] | None:
        """What else ``text_model`` takes, made of token ids alone."""


class ModulesExecutor:
    """An :class:`Executor` around transformers' own decoder code.

    The constructor runs two tokens through the decoder to learn what each layer keeps. It raises UNSUPPORTED for a
    decoder that keeps state elsewhere than in keys and values.
    """

    def __init__(self, decoder: DecoderModel) -> None:
        refuse_unsupported(decoder)
        register()
        self._decoder = decoder
        self._arguments: Mapping[str, torch.Tensor] = {}
        self._stored = StoredStates(int(decoder.config.num_hidden_layers))
        self._rope = rope.by_request(decoder.text_model, decoder.config)
        model: Any = decoder.text_model
        model.set_attn_implementation(ATTENTION)
        attach(model)
        latent.attach(model)
        probe = _Probe()
        device = next(model.parameters()).device
        with torch.inference_mode():
            ids = torch.zeros(2, dtype=torch.int64, device=device)
            positions = torch.arange(2, device=device).expand(token_axes(decoder), 2)
            self.forward(self.embed(ids, torch.zeros_like(ids, dtype=torch.bool)), positions, probe, None)
        expected = int(decoder.config.num_hidden_layers)
        kinds = list(getattr(decoder.config, "layer_types", None) or ["full_attention"] * expected)[:expected]
        across = frozenset(getattr(decoder.config, "cross_attention_layers", None) or ())
        attending = {layer for layer, kind in enumerate(kinds) if kind in _ATTENTION_LAYERS} - across
        recurrent = {layer for layer, kind in enumerate(kinds) if kind in RECURRENT_LAYERS}
        wrong = set(probe.layers) != attending or probe.calls != len(attending) or len(kinds) != expected
        if wrong or set(probe.states.shapes) != recurrent:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{type(model).__name__} has {expected} layers, {len(attending)} with attention and {len(recurrent)} "
                f"with a recurrent state, but {len(probe.layers)} keep keys and values that can be paged and "
                f"{len(probe.states.shapes)} a state that is known; other state is not supported",
                "model",
                "language_model",
            )
        if not attending:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"{type(model).__name__} has no layer with attention, which the engine does not support yet",
                "model",
                "language_model",
            )
        if getattr(decoder.config, "sliding_window", None):
            typed = getattr(decoder.config, "layer_types", None)
            sliding = {layer for layer in attending if not typed or kinds[layer] == "sliding_attention"}
            if any(probe.layers[layer].window is None for layer in sliding):
                # a mask alone holds it, and there is none here
                raise TriptychError(
                    ErrorKind.UNSUPPORTED,
                    f"{type(model).__name__} has a sliding window that its attention function is not told of",
                    "model",
                    "language_model",
                )
        shares = _shared_layers(model)
        self.layers = tuple(
            replace(probe.layers.get(layer, NOTHING), shares=shares.get(layer)) for layer in range(expected)
        )
        self.states: Mapping[int, StateShape] = probe.states.shapes
        self.dtype = probe.dtype

    def embed(self, ids: torch.Tensor, is_media: torch.Tensor) -> torch.Tensor:
        """See :class:`Executor`."""
        if self._decoder.token_arguments is not None:
            self._arguments = self._decoder.token_arguments(ids)
        return self._decoder.embed(ids, is_media)

    def forward(
        self,
        embeddings: torch.Tensor,
        position_ids: torch.Tensor,
        context: AttentionContext,
        deepstack: Deepstack | None,
    ) -> torch.Tensor:
        """See :class:`Executor`."""
        extra: dict[str, Any] = dict(self._arguments)
        if context.cross is not None:
            # else there are no media, and transformers leaves these layers out
            seeing = context.cross.seeing(embeddings)
            extra |= {"past_key_values": self._stored, "full_text_row_masked_out_mask": seeing}
        if deepstack is not None:
            mask = torch.zeros(1, embeddings.shape[0], dtype=torch.bool, device=embeddings.device)
            mask[0, deepstack.places] = True
            extra |= {"visual_pos_masks": mask, "deepstack_visual_embeds": list(deepstack.rows)}
        axes = self._decoder.num_axes
        positions, others = position_ids[:axes], position_ids[axes:]
        if self._rope is not None:
            self._rope.choose(positions, others[-1])
            others = others[:-1]
        extra |= {name: row[None] for name, row in zip(self._decoder.token_extras, others, strict=True)}
        output = self._decoder.text_model(
            inputs_embeds=embeddings[None],
            position_ids=positions[:, None] if axes > 1 else positions,
            attention_mask=None,
            use_cache=False,
            context=context,
            **extra,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See :class:`Executor`."""
        out: torch.Tensor = self._decoder.lm_head(hidden)
        return out


def token_axes(decoder: DecoderModel) -> int:
    """Axes of position ids with everything that the decoder needs to know of a token beside.

    Those are its token extras and, where rotary frequencies have a switch, whether the token's request takes the long
    ones (1) or the short ones (0).
    """
    switch = rope.RopeSwitch.of(decoder.config)
    return decoder.num_axes + len(decoder.token_extras) + (switch is not None)


def make_executor(decoder: DecoderModel, backend: str) -> Executor:
    """The executor that ``decoder_backend`` asks for.

    Args:
        decoder: loaded on its device.
        backend: "transformers", "fused", or "auto": fused where the decoder allows it.

    Raises:
        TriptychError: UNSUPPORTED, for a decoder that nothing here can run, or that cannot be fused but should be.
    """
    refuse_unsupported(decoder)
    if backend != "transformers":
        # imported here: the fused decoder is made of what this module declares
        from . import fused

        built = fused.build(decoder)
        if not isinstance(built, str):
            return built
        if backend == "fused":
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"decoder_backend fused cannot run {type(decoder.text_model).__name__}: {built}",
                "settings.decoder_backend",
                "language_model",
            )
        logger.info("the decoder runs on transformers' modules, not fused: %s", built)
    return ModulesExecutor(decoder)


def _shared_layers(model: nn.Module) -> dict[int, int]:
    """Layer that keeps no keys and values -> the one that keeps them for it."""
    stores: dict[str, int] = {}
    found: dict[int, int] = {}
    for module in model.modules():
        here: Any = module
        if getattr(module, "store_full_length_kv", False):
            stores[here.layer_type] = int(here.layer_idx)
        elif getattr(module, "is_kv_shared_layer", False):
            found[int(here.layer_idx)] = stores[here.layer_type]
    return found


class _Probe:
    """An attention context that keeps nothing but shapes; every token of the batch belongs to one request."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self.states = StateProbe()
        self.cross: CrossStep | None = None
        self.calls = 0
        self.dtype = torch.float32

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: How) -> torch.Tensor:
        self.calls += 1
        shapes = (key.shape[0], key.shape[2]), (value.shape[0], value.shape[2])
        self.layers[layer] = LayerShape(*shapes, how.window, how.latent is not None)
        self.dtype = key.dtype
        if how.latent is not None:
            return self._attend_latents(layer, query, key, how.latent, how)
        return attention(query[None], key[None], value[None], None, how)[0].transpose(0, 1)

    def _attend_latents(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, latents: latent.Latent, how: How
    ) -> torch.Tensor:
        """As transformers does, and once more over the latents: that must give the same."""
        keys, values = latents.expand(key)
        out = attention(query[None], keys, values, None, how)[0].transpose(0, 1)
        absorbed = latents.absorb(query.transpose(0, 1)).transpose(0, 1)
        kept = key[None]
        again = attention(absorbed[None], kept, kept[..., : latents.rank], None, how)[0].transpose(0, 1)
        error = (latents.project(again) - out).float().norm() / out.float().norm().clamp_min(1e-30)
        if error > (1e-3 if key.dtype == torch.float32 else 5e-2):
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"layer {layer} makes keys and values of its latents in a way that the engine does not know: attention "
                f"over latents departs by {error:.1e} of its result",
                "model",
                "language_model",
            )
        return out

    def rotate_and_store(
        self, layer: int, qkv: torch.Tensor, heads: tuple[int, int], rope: Rope | None, norm: HeadNorm | None
    ) -> torch.Tensor:
        raise NotImplementedError("transformers' layers only attend")

    def attend_stored(self, layer: int, query: torch.Tensor, how: How) -> torch.Tensor:
        raise NotImplementedError("transformers' layers only attend")


def refuse_unsupported(decoder: DecoderModel) -> None:
    """Raise UNSUPPORTED for what would run but give other tokens than transformers."""
    config = decoder.config
    reason = None
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - _ATTENTION_LAYERS - RECURRENT_LAYERS - _PLAIN_LAYERS:
        reason = f"layers of type {', '.join(sorted(map(str, other)))}"
    elif getattr(config, "index_topk", None) is not None:
        # DeepSeek-V3.2 and its like
        reason = "attention to tokens that an indexer chooses"
    elif getattr(config, "hidden_size_per_layer_input", 0) and decoder.token_arguments is None:
        reason = "embeddings of each token for every layer"
    elif (getattr(config, "num_kv_shared_layers", 0) or 0) != len(_shared_layers(decoder.text_model)):
        reason = "layers that share keys and values in a way of their own"
    elif getattr(config, "use_bidirectional_attention", None) is True:
        # Gemma 3's embedding models
        reason = "bidirectional attention over text"
    else:
        reason = rope.refusal(decoder.text_model, config, decoder.num_axes)
    if reason is not None:
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"{type(decoder.text_model).__name__} has {reason}, which the engine does not support yet",
            "model",
            "language_model",
        )
