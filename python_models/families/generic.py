"""Families without a file of their own: what transformers can load and what follows its usual way of mixing media.

A class fits where the code of its forward passes shows nothing but the usual steps: the rows of
``get_{image,video,audio}_features`` take the places of placeholder tokens, then the language model runs on embeddings
and positions, then the head. Whatever else the code does is a reason to refuse it (see :mod:`.generic_rules`).

Media go through the checkpoint's processor one by one for their features, and all together for the prompt, so that
every tensor belongs to one medium. Features travel as the processor makes them. It is slower than a family of its own.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage

from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Audio, Image, Medium, Video
from .base import Decoder, Family
from .checkpoint import Checkpoint
from .generic_rules import UnfitError, head_of, multimodal_parts, text_model_of
from .loading import meta_model, model_class
from .text_only import TextPreprocessor
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor

logger = logging.getLogger(__name__)

_ENCODERS = {"image": "vision", "video": "vision", "audio": "audio"}
_COUNT = "rows"
# transformers' mappings of model_type to class, the first that knows one wins
_KINDS = ("MULTIMODAL_LM", "CAUSAL_LM")
# names in auto_map under which a checkpoint's own code may hold a model that writes text
_AUTO = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM")


class GenericPreprocessor(TransformersPreprocessor):
    """Any processor whose placeholder tokens are those of the configuration."""

    # it may ask where in the text a token is
    shortens_runs = False

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        super().__init__(checkpoint, settings, model, encoders)
        self._names = {
            modality: frozenset(inspect.signature(getattr(self.base, f"get_{modality}_features")).parameters)
            for modality in encoders
        }
        for modality in encoders:
            # a processor that needs something else says so before the first request
            tensors = self._alone(_probe(modality, self.sampling_rate))
            if not tensors[_COUNT].item() or len(tensors) < 2:
                raise TriptychError(
                    ErrorKind.UNSUPPORTED,
                    f"{checkpoint.folder} is not supported because {type(self.processor).__name__} leaves no token "
                    f"{self._placeholder(modality)!r} in the prompt for its {modality}",
                    "settings.model",
                )

    def first_call(self) -> None:
        """Some processors want a medium with every text: without one, the tokenizer alone is called."""
        try:
            self.processor(text=["a"], return_tensors="pt")
            self._takes_text = True
        except (TypeError, ValueError):
            self._takes_text = False

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Frames are those sampled while decoding."""
        from transformers.video_utils import VideoMetadata

        arguments: dict[str, Any] = {}
        if images := [m.data.pixels for m in media.get("image", ()) if isinstance(m.data, Image)]:
            arguments["images"] = images
        if videos := [m.data for m in media.get("video", ()) if isinstance(m.data, Video)]:
            arguments["videos"] = [video.frames for video in videos]
            arguments["videos_kwargs"] = {
                "do_sample_frames": False,
                "video_metadata": [
                    VideoMetadata(
                        total_num_frames=video.total_frames,
                        fps=video.source_fps,
                        duration=video.duration_s,
                        frames_indices=list(video.indices),
                        height=video.frames.shape[1],
                        width=video.frames.shape[2],
                    )
                    for video in videos
                ],
            }
        if sounds := [m.data.samples for m in media.get("audio", ()) if isinstance(m.data, Audio)]:
            arguments["audio"] = sounds
        return arguments

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per medium what ``get_{modality}_features`` takes of its own result, and its number of ``rows``."""
        return {modality: [self._alone(medium) for medium in own] for modality, own in media.items()}

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Placeholder tokens in a prompt of this medium alone; together they must be those of the whole prompt."""
        return int(tensors[_COUNT].item())

    def position_arguments(
        self, batch: Mapping[str, Any], features: Mapping[str, Sequence[Tensors]], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, Any]:
        """Grids, times per grid and the like, by the processor's own names."""
        own = ("input_ids", "attention_mask", "mm_token_type_ids")
        return {name: value for name, value in batch.items() if name not in own}

    def _call(self, text: str, grouped: Mapping[str, Sequence[Medium]]) -> Mapping[str, Any]:
        # a tokenizer whose padding differs from call to call must not be called twice at once
        with self._lock:
            if grouped or self._takes_text:
                return super()._call(text, grouped)
            tokenizer = self.processor.tokenizer
            begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
            batch: Mapping[str, Any] = tokenizer([text], return_tensors="pt", add_special_tokens=not begun)
            return batch

    def _alone(self, medium: Medium) -> Tensors:
        modality = medium.modality
        batch = self._call(self._placeholder(modality), {modality: [medium]})
        wanted = self._names[modality]
        tensors = {k: v.numpy() for k, v in batch.items() if k in wanted and isinstance(v, torch.Tensor)}
        rows = int((np.asarray(batch["input_ids"]) == self._tokens[modality]).sum())
        return {**tensors, _COUNT: np.array([rows], dtype=np.int64)}


class GenericEncoder(TransformersEncoder):
    """A tower that is called for one item after the other."""

    def __init__(self, model: Any, device: str, dtype: torch.dtype) -> None:
        super().__init__(model, device, dtype)
        self.width *= 1 + deepstack_layers(model)

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """See :meth:`GenericPreprocessor.split_features`."""
        return [self._one(getattr(self.base, f"get_{modality}_features"), item) for item in items]

    def _one(self, features: Callable[..., Any], item: EncoderItem) -> torch.Tensor:
        given = {name: self.to_device(array) for name, array in item.tensors.items() if name != _COUNT}
        given = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in given.items()}
        output = features(**given, return_dict=True)
        parts = [_flat(output.pooler_output), *map(_flat, getattr(output, "deepstack_features", None) or ())]
        return torch.cat(parts, dim=-1)


class _Generic(TransformersFamily):
    """What both kinds share."""

    cls: ClassVar[Any]
    """The model's class."""

    def load_class(self) -> Any:
        """See :attr:`cls`."""
        return self.cls

    def _decoder(self, model: Any, embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Decoder:
        finish = head_of(model)
        if finish is not None:
            # what the model does with its head's output; fused layers read it from the configuration
            model.lm_head.register_forward_hook(lambda module, arguments, logits: finish(logits))
        return super()._decoder(model, embed)


class GenericFamily(_Generic):
    """A language model beside towers."""

    preprocessor_class = GenericPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {
        "vision": GenericEncoder,
        "audio": GenericEncoder,
    }


class GenericText(_Generic):
    """A language model alone."""

    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    modality_encoders: ClassVar[Mapping[str, str]] = {}
    preprocessor_class = TextPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {}


def known_model_types(*kinds: str) -> frozenset[str]:
    """Every ``model_type`` that transformers has a class for that writes text, whether it fits or not.

    Args:
        kinds: of "MULTIMODAL_LM" and "CAUSAL_LM" those wanted; none for both.
    """
    return frozenset(model_type for kind in kinds or _KINDS for model_type in _classes(kind))


def find(checkpoint: Checkpoint, settings: Settings) -> Family | None:
    """The family of a checkpoint that no file is written for.

    A class that the checkpoint itself brings along is the last resort, where the operator trusts it.

    Returns:
        None where neither transformers nor the checkpoint has a class for it.

    Raises:
        TriptychError: UNSUPPORTED, with what does not fit.
    """
    known = _known_class(checkpoint) or _own_class(checkpoint, settings)
    if known is None:
        return None
    cls, alone = known
    try:
        found = _family(cls, checkpoint, alone=alone)
    except UnfitError as error:
        raise _unsupported(checkpoint, f"{error} (model_type {checkpoint.model_type}, {cls.__name__})") from None
    logger.warning("no file is written for model_type %s: it runs through the generic adapter", checkpoint.model_type)
    return found(checkpoint, settings)


def _known_class(checkpoint: Checkpoint) -> tuple[Any, bool] | None:
    """(class of transformers, it may be of a language model alone)."""
    for kind in _KINDS:
        names = _classes(kind).get(checkpoint.model_type, ())
        if names:
            wanted = [name for name in names if name in checkpoint.config.get("architectures", ())]
            name = (wanted or names)[0]
            return model_class(name), kind == "CAUSAL_LM" or name.endswith("ForCausalLM")
    return None


def _own_class(checkpoint: Checkpoint, settings: Settings) -> tuple[Any, bool] | None:
    """The same of the class in a checkpoint's own code."""
    names = checkpoint.config.get("auto_map") or {}
    name = next((names[auto] for auto in _AUTO if auto in names), None)
    if name is None:
        return None
    if not settings.trust_remote_code:
        raise _unsupported(
            checkpoint,
            f"Triptych knows no model_type {checkpoint.model_type!r}, and code that the checkpoint brings along "
            f"({name}) only runs where it is trusted: with --trust-remote-code",
        )
    model_class("AutoConfig")
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(name, checkpoint.folder), True


def _unsupported(checkpoint: Checkpoint, reason: str) -> TriptychError:
    message = f"{checkpoint.folder} is not supported because {reason}"
    return TriptychError(ErrorKind.UNSUPPORTED, message, "settings.model")


def deepstack_layers(model: Any) -> int:
    """Layers of the language model that take rows of their own."""
    if "deepstack_visual_embeds" not in inspect.signature(model.get_decoder().forward).parameters:
        return 0
    return len(model.config.vision_config.deepstack_visual_indexes)


def _family(cls: Any, checkpoint: Checkpoint, *, alone: bool) -> type[_Generic]:
    """The adapter of a class, which may be of a language model alone."""
    try:
        model = meta_model(cls, cls.config_class.from_pretrained(checkpoint.folder))
    except (ImportError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise UnfitError(f"its model cannot be built: {str(error).strip().splitlines()[0]}") from None
    head_of(model)
    if not any(hasattr(model.base_model, f"get_{modality}_features") for modality in _ENCODERS):
        if not alone:
            raise UnfitError("it has none of get_image_features, get_video_features and get_audio_features")
        text_model_of(model)
        return type("GenericText", (GenericText,), {"cls": cls})
    modalities, parts = multimodal_parts(model)
    encoders = {modality: _ENCODERS[modality] for modality in modalities}
    return type(
        "GenericFamily",
        (GenericFamily,),
        # which of them a modality needs, the code does not say: both towers of a model that has two go to each stage
        {"cls": cls, "modality_encoders": encoders, "towers": dict.fromkeys(encoders.values(), parts)},
    )


def _classes(kind: str) -> Mapping[str, tuple[str, ...]]:
    model_class("AutoConfig")
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
    return {model_type: (own,) if isinstance(own, str) else tuple(own) for model_type, own in names.items()}


def _flat(rows: Any) -> torch.Tensor:
    """[n, H]."""
    joined: torch.Tensor = rows if isinstance(rows, torch.Tensor) else torch.cat([part.flatten(0, -2) for part in rows])
    return joined.flatten(0, -2)


def _probe(modality: str, sampling_rate: int) -> Medium:
    """A small medium."""
    if modality == "image":
        data: Any = Image(PILImage.new("RGB", (64, 64)))
    elif modality == "video":
        data = Video(np.zeros((4, 64, 64, 3), dtype=np.uint8), 2.0, 2.0, 2.0, (0, 1, 2, 3), 4)
    else:
        data = Audio(np.zeros(sampling_rate, dtype=np.float32), sampling_rate)
    return Medium(modality, data, "", "settings.model")
