"""MiniCPM-V 4.6, 4.7 and MiniCPM-OCR: image, video; a decoder of gated delta nets and attention (Qwen 3.5).

A picture is an overview and, where it is large, slices of it, each in patches of its own grid; a video is one picture
for each frame. Patches travel as uint8 and the encoder normalises them, bit for bit as the processor would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ...kernels.image import normalise_patches
from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Image, Medium, Video
from .base import FrameSampling
from .checkpoint import Checkpoint
from .pixels import normalisation
from .qwen_vision import video_metadata
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor

# pixels as they are, but in floating point: torch cuts patches out of nothing else
_RAW = {"do_rescale": True, "rescale_factor": 1.0, "do_normalize": False, "return_tensors": "pt"}


class MiniCPMV4Preprocessor(TransformersPreprocessor):
    """Pictures and videos through the parts of MiniCPMV4_6Processor, which mixes the slices of all of them."""

    default_sampling = FrameSampling(fps=1.0, min_frames=1, max_frames=128, multiple=1)

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        self._processors = {"image": self.processor.image_processor, "video": self.processor.video_processor}
        self._normalisation = {m: normalisation(p, m) for m, p in self._processors.items()}
        if self.processor.video_processor.stack_frames > 1:
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                "stack_frames, several frames of a second in one picture, is not supported: set it to 1 in the "
                "checkpoint's processor_config.json",
                "settings.model",
            )

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Not needed: the processor's parts are called one by one."""
        return {}

    def _call(self, text: str, grouped: Mapping[str, Sequence[Medium]]) -> Mapping[str, Any]:
        processor = self.processor
        features: dict[str, list[Tensors]] = {}
        written: dict[str, list[str]] = {}
        for medium in (m for media in grouped.values() for m in media):
            if isinstance(medium.data, Image):
                found, (replacement,) = processor._process_images([medium.data.pixels], **_RAW)
                pixels, sizes = found["pixel_values"], found["target_sizes"]
            elif isinstance(medium.data, Video):
                found, (replacement,) = processor._process_videos(
                    [medium.data.frames],
                    do_sample_frames=False,
                    input_data_format="channels_last",
                    video_metadata=[video_metadata(medium.data)],
                    **_RAW,
                )
                pixels, sizes = found["pixel_values_videos"], found["target_sizes_videos"]
            mean, std = self._normalisation[medium.modality]
            own = {"pixels": pixels[0].to(torch.uint8).numpy(), "sizes": sizes.numpy().astype(np.int64)}
            features.setdefault(medium.modality, []).append(own | {"mean": mean, "std": std})
            written.setdefault(medium.modality, []).append(replacement)
        for modality, replacements in written.items():
            if processor.default_use_image_id:
                token = getattr(processor, f"{modality}_token")
                written[modality] = processor._prepend_local_ids([text], replacements, token)
        (whole,), _ = processor.get_text_with_replacements(
            [text], images_replacements=written.get("image", []), videos_replacements=written.get("video", [])
        )
        return {"input_ids": processor.tokenizer([whole])["input_ids"], "features": features}

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """The arrays that travel.

        Per item ``pixels`` uint8 [channels, patch size, patches of all its slices * patch size], ``sizes`` int64
        [slices, 2] (rows and columns of patches), ``mean``, ``std``.
        """
        features: dict[str, list[Tensors]] = batch["features"]
        return features

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Patches, merged in squares of four or of sixteen."""
        merged = 4 if self._processors[modality].downsample_mode == "4x" else 16
        return int((tensors["sizes"].prod(-1) // merged).sum())

    def position_arguments(
        self, batch: Mapping[str, Any], features: Mapping[str, Sequence[Tensors]], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, Any]:
        """Of 4.7: the grids of all slices."""
        names = {"image": "target_sizes", "video": "target_sizes_videos"}
        return {names[m]: torch.from_numpy(np.concatenate([t["sizes"] for t in own])) for m, own in features.items()}


class MiniCPMV4VisionEncoder(TransformersEncoder):
    """The tower and its mergers."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All slices in one run of the tower; frames of videos are pictures."""
        pixels = torch.cat([self._pixels(item) for item in items], dim=-1)
        sizes = torch.from_numpy(np.concatenate([item.tensors["sizes"] for item in items])).to(self.device)
        return self.base.get_image_features(pixels, sizes, return_dict=True).pooler_output

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[1, channels, patch size, patches * patch size] in the tower's dtype."""
        pixels = self.to_device(item.tensors["pixels"])
        mean, std = self.to_device(item.tensors["mean"]), self.to_device(item.tensors["std"])
        # to the kernel all of it is one patch of one frame
        return normalise_patches(pixels.flatten(1)[None, :, None], mean, std, 1, self.dtype).view(1, *pixels.shape)


class MiniCPMV46(TransformersFamily):
    """MiniCPM-V 4.6."""

    model_class = "MiniCPMV4_6ForConditionalGeneration"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vision_tower", "merger")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class = MiniCPMV4Preprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": MiniCPMV4VisionEncoder}


class MiniCPMV47(MiniCPMV46):
    """MiniCPM-V 4.7: positions on a canvas (three axes)."""

    model_class = "MiniCPMV4_7ForConditionalGeneration"


class MiniCPMOcr(MiniCPMV46):
    """MiniCPM-OCR: four times as many tokens for a picture."""

    model_class = "MiniCPMOcrForConditionalGeneration"
