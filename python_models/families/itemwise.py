"""Processors that are called for one medium at a time.

A processor's result for a prompt pads media of different sizes to one shape, refuses videos of different lengths and,
in some families, mixes pictures and videos in one array. For one medium alone it does neither, so each goes through it
alone; its placeholder in the prompt is then replaced by the text that the processor itself puts there.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..media.types import Image, Medium, Video
from .pixels import RAW
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class ItemwisePreprocessor(TransformersPreprocessor):
    """Pictures and videos of a processor that has ``replace_image_token`` and ``replace_video_token``."""

    needs_text: ClassVar[bool] = False
    """The processor takes no media without a text, or :meth:`tensors` reads its tokens; there may be thousands."""

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Pixels stay uint8; frames are those sampled while decoding."""
        arguments: dict[str, Any] = {}
        if images := [m.data.pixels for m in media.get("image", ()) if isinstance(m.data, Image)]:
            arguments["images"] = images
            arguments["images_kwargs"] = RAW | self._tiles(media["image"])
        if videos := [m.data.frames for m in media.get("video", ()) if isinstance(m.data, Video)]:
            arguments["videos"] = videos
            arguments["videos_kwargs"] = {**RAW, "do_sample_frames": False, "input_data_format": "channels_last"}
        return arguments

    @property
    def cuts_tiles(self) -> bool:  # type: ignore[override]
        """Where its image processor can be told."""
        return hasattr(self.processor.image_processor, "max_patches")

    def _tiles(self, media: Sequence[Medium]) -> dict[str, int]:
        """What the image processor is told of the number of tiles of pictures that it sees together."""
        options = media[0].options
        if not self.cuts_tiles or not options or len(media) > 1:
            return {}
        own = self.processor.image_processor
        most = 1 if options.detail == "low" else options.max_dynamic_patch or int(own.max_patches)
        least = options.min_dynamic_patch or min(int(own.min_patches), most)
        return {"min_patches": least, "max_patches": max(most, least)}

    @abstractmethod
    def tensors(self, modality: str, batch: Mapping[str, Any], index: int) -> Tensors:
        """What the encoder takes of item ``index`` of a processor's result."""

    @abstractmethod
    def expansion(self, modality: str, tensors: Tensors) -> str:
        """What stands in the prompt for an item."""

    def groups(self, modality: str, media: Sequence[Medium]) -> Sequence[Sequence[Medium]]:
        """Media that the processor must see together."""
        return [[medium] for medium in media]

    def row_token(self, modality: str) -> str:
        """The token of an expansion that stands for an embedding row."""
        return self._placeholder(modality)

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """See :meth:`tensors`."""
        features: dict[str, list[Tensors]] = batch["features"]
        return features

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Placeholder tokens in the expansion."""
        return self.expansion(modality, tensors).count(self.row_token(modality))

    def _call(self, text: str, grouped: Mapping[str, Sequence[Medium]]) -> Mapping[str, Any]:
        features: dict[str, list[Tensors]] = {}
        for modality, media in grouped.items():
            features[modality] = []
            for group in self.groups(modality, media):
                arguments = self.processor_arguments({modality: group})
                if self.needs_text:
                    arguments["text"] = [self._placeholder(modality) * len(group)]
                batch = self.processor(return_tensors="pt", **arguments)
                features[modality] += [self.tensors(modality, batch, k) for k in range(len(group))]
        text = self._expand(text, features)
        bos = self.processor.tokenizer.bos_token
        # as apply_chat_template does it: the template may have begun the prompt already
        begun = bos is not None and text.startswith(bos)
        ids = self.processor.tokenizer([text], **({"add_special_tokens": False} if begun else {}))["input_ids"]
        return {"input_ids": ids, "features": features}

    def _expand(self, text: str, features: Mapping[str, Sequence[Tensors]]) -> str:
        modalities = {self._placeholder(modality): modality for modality in features}
        waiting = {modality: iter(items) for modality, items in features.items()}
        counts = {modality: text.count(token) for token, modality in modalities.items()}
        for modality, items in features.items():
            if counts[modality] != len(items):
                raise ValueError(f"the prompt has {counts[modality]} places for {len(items)} media of type {modality}")

        def put(match: re.Match[str]) -> str:
            modality = modalities[match.group()]
            return self.expansion(modality, next(waiting[modality]))

        return re.sub("|".join(re.escape(token) for token in modalities), put, text) if modalities else text
