"""Nemotron Omni (nemotron_h_omni): image, video and audio, a decoder of Mamba-2, attention and expert layers.

Pictures and frames are resized with floating point values that overshoot the range of bytes (transformers keeps the
overshoot), so they travel as float32. A video is written as a picture for each pair of frames, with their times between
them, and its tokens can be pruned (see :mod:`.evs`). transformers' processor takes one video a prompt; its parts are
called one by one here, for any number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Audio, Image, Medium, Video
from .base import FrameSampling
from .checkpoint import Checkpoint
from .qwen_vision import video_metadata
from .transformers_encoder import TransformersEncoder
from .transformers_family import TransformersFamily
from .transformers_preprocessor import Tensors, TransformersPreprocessor


class NemotronPreprocessor(TransformersPreprocessor):
    """Pictures, videos and sounds through the parts of NemotronH_Omni_Reasoning_V3Processor."""

    default_sampling = FrameSampling(fps=2.0, min_frames=4, max_frames=128, multiple=1)

    def token_id(self, modality: str) -> int:
        """Videos are written as pictures."""
        return int(self.config.audio_token_id if modality == "audio" else self.config.image_token_id)

    def _placeholder(self, modality: str) -> str:
        return str(getattr(self.processor, f"{modality}_token"))

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """Not needed: the processor's parts are called one by one."""
        return {}

    def _call(self, text: str, grouped: Mapping[str, Sequence[Medium]]) -> Mapping[str, Any]:
        processor = self.processor
        replacements: dict[str, list[str]] = {}
        batch: dict[str, Any] = {}
        if images := [m.data.pixels for m in grouped.get("image", ()) if isinstance(m.data, Image)]:
            found = processor.image_processor(images=images, return_tensors="pt")
            batch["images"] = found
            replacements["images_replacements"] = [processor.replace_image_token(found, k) for k in range(len(images))]
        if videos := [m.data for m in grouped.get("video", ()) if isinstance(m.data, Video)]:
            batch["videos"] = []
            for video in videos:
                found = processor.video_processor(
                    videos=[video.frames],
                    do_sample_frames=False,
                    input_data_format="channels_last",
                    return_tensors="pt",
                )
                batch["videos"].append(found)
                written = processor.replace_video_token(
                    found, 0, num_frames=len(video.frames), video_metadata=video_metadata(video)
                )
                replacements.setdefault("videos_replacements", []).append(written)
        if sounds := [m.data.samples for m in grouped.get("audio", ()) if isinstance(m.data, Audio)]:
            mels, mask, counts = processor._process_audio(sounds, {"sampling_rate": self.sampling_rate})
            batch["sounds"] = mels, mask
            replacements["audio_replacements"] = [
                processor.replace_audio_token({"num_tokens": counts}, k) for k in range(len(sounds))
            ]
        (whole,), _ = processor.get_text_with_replacements([text], **replacements)
        batch["input_ids"] = processor.tokenizer([whole])["input_ids"]
        return batch

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """The arrays that travel.

        Per picture ``patches`` float32 [patches, values] and ``grid`` int64 [2] (rows, columns); per video ``frames``
        float32 [frames, channels, height, width]; per sound ``mel`` float32 [frames, bins].
        """
        out: dict[str, list[Tensors]] = {}
        if "images" in batch:
            grids = batch["images"]["image_grid_hw"]
            patches = batch["images"]["pixel_values"].split(grids.prod(-1).tolist())
            out["image"] = [
                {"patches": own.numpy(), "grid": grid.numpy().astype(np.int64)}
                for own, grid in zip(patches, grids, strict=True)
            ]
        if "videos" in batch:
            out["video"] = [{"frames": found["pixel_values_videos"].numpy()} for found in batch["videos"]]
        if "sounds" in batch:
            mels, mask = batch["sounds"]
            # the last frame is masked, but counts as a position
            lengths = [mels.shape[1]] * len(mels) if mask is None else (mask.sum(-1) + 1).tolist()
            out["audio"] = [
                {"mel": mel[:length].contiguous().numpy()} for mel, length in zip(mels, lengths, strict=True)
            ]
        return out

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """A quarter of the patches; of sounds, what three strided convolutions leave."""
        if modality == "image":
            return int(tensors["grid"].prod()) // self._merge**2
        if modality == "video":
            frames, height, width = self.video_grid(tensors)
            return frames * height * width
        length = (len(tensors["mel"]) - 1) * int(self.processor.audio_hop_length)
        return max(int(self.processor._estimate_audio_num_embeddings(length)), 1)

    def video_grid(self, tensors: Tensors) -> tuple[int, int, int]:
        """Groups of frames that become one picture, rows and columns of its tokens."""
        frames, _, height, width = tensors["frames"].shape
        side = int(self.processor.video_processor.patch_size) * self._merge
        return -(-frames // int(self.config.video_temporal_patch_size)), height // side, width // side

    @property
    def _merge(self) -> int:
        return round(1 / float(self.config.downsample_ratio))


class NemotronVisionEncoder(TransformersEncoder):
    """RADIO and its projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pictures in one run of the tower; videos, whose frames differ in size, one by one."""
        if modality == "image":
            patches = torch.cat([self.to_device(item.tensors["patches"]) for item in items])
            grids = torch.from_numpy(np.stack([item.tensors["grid"] for item in items])).to(self.device)
            return self.base.get_image_features(patches, grids, return_dict=True).pooler_output
        rows = []
        for item in items:
            frames = self.to_device(item.tensors["frames"])
            out = self.base.get_video_features(frames, return_dict=True).pooler_output
            rows.append(out.reshape(-1, self.width))
        return rows


class NemotronAudioEncoder(TransformersEncoder):
    """Parakeet and its projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All sounds in one run."""
        mels = [self.to_device(item.tensors["mel"]) for item in items]
        padded = nn.utils.rnn.pad_sequence(mels, batch_first=True)
        lengths = torch.tensor([len(mel) - 1 for mel in mels], device=self.device)
        mask = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        return self.base.get_audio_features(padded, mask, return_dict=True).pooler_output


class NemotronOmni(TransformersFamily):
    """Nemotron Nano Omni (nvidia/Nemotron-3-Nano-Omni-30B-A3B)."""

    model_class = "NemotronH_Omni_Reasoning_V3"
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vision_model", "multi_modal_projector"),
        "audio": ("audio_tower", "embed_audio"),
    }
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision", "audio": "audio"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = NemotronPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {
        "vision": NemotronVisionEncoder,
        "audio": NemotronAudioEncoder,
    }

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        super().__init__(checkpoint, settings)
        config = self.load_config()
        towers = dict(self.towers)
        if config.text_config.num_nextn_predict_layers:
            # such checkpoints were trained with one norm more
            towers["vision"] = (*towers["vision"], "vision_final_layernorm")
        if config.audio_config is None:
            towers.pop("audio", None)
        encoders = {modality: encoder for modality, encoder in self.modality_encoders.items() if encoder in towers}
        # of this checkpoint, not of the class
        vars(self).update(towers=towers, modality_encoders=encoders)
        self.encoders = frozenset(towers)

    def decoder_parts(self, model: Any) -> list[str]:
        """The language model has its head inside."""
        return ["language_model"]

    def text_model(self, model: Any) -> Any:
        """Without the head."""
        return model.language_model.model

    def head(self, model: Any) -> Any:
        """Of the language model."""
        return model.language_model.lm_head
