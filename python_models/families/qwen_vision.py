"""Pictures and videos of the Qwen-VL line: patches of any number per item, described by a grid (t, h, w).

The processor normalises pixels to float32, repeats each picture along time (a patch spans several frames) and cuts
patches. For the way between processes pictures stay whole and uint8, an eighth of the bytes, and the encoder cuts and
normalises them in the very same way (``kernels/image``). The values are equal bit for bit. Videos travel as patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...kernels.image import normalise_patches, normalise_patchify
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Image, Medium, Video
from .checkpoint import Checkpoint
from .pixels import RAW, PictureSizes, check_bytes, keep_pictures_whole, normalisation, resized, take_videos_in_place
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import Tensors, TransformersPreprocessor

_NAMES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class QwenVisionPreprocessor(TransformersPreprocessor):
    """Pictures and videos through Qwen2VLImageProcessor and Qwen2VLVideoProcessor."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, model: Any, encoders: Mapping[str, str]) -> None:
        super().__init__(checkpoint, settings, model, encoders)
        self._processors = {m: getattr(self.processor, f"{m}_processor") for m in _NAMES if m in encoders}
        self._normalisation = {m: normalisation(p, m) for m, p in self._processors.items()}
        check_bytes(self.processor.image_processor)
        if "video" in encoders:
            take_videos_in_place(self.processor.video_processor)
        self._whole = keep_pictures_whole(self.processor.image_processor)
        if settings.gpu_preprocessing == "on" and self._whole and PictureSizes.fits(self.processor.image_processor):
            self.processor.image_processor = PictureSizes(self.processor.image_processor)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """See :func:`pixel_arguments`."""
        return pixel_arguments(media)

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per item ``grid`` int64 [3], ``mean``, ``std``, and its pixels, uint8.

        Those are ``picture`` [height, width, channels], of the grid's size or still to be resized to it, or ``patches``
        [patches, channels, frames, pixels].
        """
        out: dict[str, list[Tensors]] = {}
        for modality, (pixels, grid) in _NAMES.items():
            if modality not in media:
                continue
            grids = batch[grid].numpy().astype(np.int64)
            processor = self._processors[modality]
            mean, std = self._normalisation[modality]
            patches = batch[pixels]
            if modality == "image" and not len(patches):
                out[modality] = [
                    {"picture": np.asarray(medium.data.pixels), "grid": grids[k], "mean": mean, "std": std}
                    for k, medium in enumerate(media[modality])
                    if isinstance(medium.data, Image)
                ]
                continue
            if modality == "image" and self._whole:
                out[modality] = [
                    {"picture": picture.reshape(*size, len(mean)).numpy(), "grid": grids[k], "mean": mean, "std": std}
                    for k, picture in enumerate(patches.split(grids.prod(-1).tolist()))
                    for size in [grids[k, 1:] * processor.patch_size]
                ]
                continue
            patches = patches.reshape(len(patches), len(mean), -1, processor.patch_size**2)
            if modality == "image":
                # The same picture for every frame of the patch.
                patches = patches[:, :, :1]
            out[modality] = [
                {"patches": part.contiguous().numpy(), "grid": grids[k], "mean": mean, "std": std}
                for k, part in enumerate(patches.split(grids.prod(-1).tolist()))
            ]
        return out

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """Patches, merged in squares."""
        return int(tensors["grid"].prod()) // int(self._processors[modality].merge_size) ** 2

    def position_arguments(
        self, batch: Mapping[str, Any], features: Mapping[str, Sequence[Tensors]], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, Any]:
        """The grids."""
        return {name: batch[name] for _, name in _NAMES.values() if name in batch}


class QwenVisionEncoder(TransformersEncoder):
    """The tower of the Qwen-VL line."""

    def __init__(self, model: Any, device: str, dtype: torch.dtype) -> None:
        super().__init__(model, device, dtype)
        self.frames = self.frames_of_patch()

    def frames_of_patch(self) -> int:
        """Frames that a patch spans."""
        return int(self.config.vision_config.temporal_patch_size)

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All items packed into one run of the tower."""
        pixels = torch.cat([self._pixels(item) for item in items])
        grid = torch.from_numpy(np.stack([item.tensors["grid"] for item in items])).to(self.device)
        run = self.base.get_image_features if modality == "image" else self.base.get_video_features
        return self.join(run(pixels, grid, return_dict=True))

    def join(self, output: Any) -> Any:
        """Rows of all items."""
        return output.pooler_output

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        mean, std = self.to_device(item.tensors["mean"]), self.to_device(item.tensors["std"])
        vision = self.config.vision_config
        if "patches" in item.tensors:
            return normalise_patches(self.to_device(item.tensors["patches"]), mean, std, self.frames, self.dtype)
        patch, merge = int(vision.patch_size), int(vision.spatial_merge_size)
        height, width = (int(patch * edge) for edge in item.tensors["grid"][1:])
        picture = resized(self.to_device(item.tensors["picture"]), height, width)
        return normalise_patchify(picture, mean, std, patch, merge, self.frames, self.dtype)


class FrameVisionEncoder(QwenVisionEncoder):
    """A tower whose patches are of one frame; published configurations may say otherwise."""

    def frames_of_patch(self) -> int:
        """One."""
        return 1


def pixel_arguments(media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
    """Arguments of a processor for pictures and videos: pixels stay uint8; frames are those sampled while decoding."""
    arguments: dict[str, Any] = {}
    if images := [m.data for m in media.get("image", ()) if isinstance(m.data, Image)]:
        arguments["images"] = [image.pixels for image in images]
        arguments["images_kwargs"] = dict(RAW)
    if videos := [m.data for m in media.get("video", ()) if isinstance(m.data, Video)]:
        arguments["videos"] = [video.frames for video in videos]
        arguments["videos_kwargs"] = {
            **RAW,
            "do_sample_frames": False,
            "input_data_format": "channels_last",
            "video_metadata": [video_metadata(video) for video in videos],
        }
    return arguments


def video_metadata(video: Video) -> Any:
    """What processors of transformers are told of a video."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=video.total_frames,
        fps=video.source_fps,
        width=video.frames.shape[2],
        height=video.frames.shape[1],
        duration=video.duration_s,
        frames_indices=list(video.indices),
    )
