"""MiniCPM-V 2.6 (Yao et al. 2024, arXiv:2408.01800): image, video; MiniCPM-o 2.6: audio as well, text out.

The tower is a SigLIP whose patches keep a picture's own aspect ratio (transformers has it inside MiniCPM-V 4.6); a
resampler gives 64 rows for each overview and slice; the text model is Qwen2. Sounds pass Whisper's encoder, where a
second hears what came before it, two linear layers and a mean of pairs. Compared with the published config.json,
names of weights (``llm.*``, ``vpm.*``, ``resampler.*``, ``apm.*``, ``audio_projection_layer.*``) and code: which rows
of the table of positions a grid takes is computed by the published arithmetic, whose rounding transformers' differs
from for some sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ..contract.errors import ErrorKind, TriptychError
from ..contract.features import EncoderItem
from ..contract.settings import Settings
from ..media.types import Audio, Image, Medium, Video
from .composite import (
    Composite,
    CompositeConfig,
    CompositeFamily,
    block,
    chat_template,
    load_piece,
    load_tokenizer,
    required,
    text_config,
)
from .loading import model_class
from .minicpm_processing import MiniCPMProcessor, Slicer, sound_rows
from .sounds import check_sound
from .tower_attention import use_packed_attention
from .transformers_encoder import TransformersEncoder
from .transformers_preprocessor import Tensors, TransformersPreprocessor

_FRAMES_A_SECOND = 50
"""Of Whisper's encoder."""


class MiniCPMPreprocessor(TransformersPreprocessor):
    """Pictures and frames as patches of overview and slices, sounds as log-mel frames (100 a second)."""

    processor: MiniCPMProcessor
    hears: ClassVar[bool] = False
    """It takes sounds."""

    def load_processor(self, folder: Path, settings: Settings) -> MiniCPMProcessor:
        """Made of preprocessor_config.json; the checkpoint's own is code."""
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise TriptychError(
                ErrorKind.MODEL_NOT_FOUND, f"{folder} has no preprocessor_config.json", "settings.model"
            )
        options = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(folder)
        extractor = None
        if self.hears:
            extractor = load_piece("WhisperFeatureExtractor", "feature extractor", folder)
        slicer = Slicer.from_options(options)
        if tokenizer.convert_tokens_to_ids(slicer.unk) is None:
            raise TriptychError(ErrorKind.UNSUPPORTED, f"the tokenizer of {folder} has no {slicer.unk!r}")
        return MiniCPMProcessor(tokenizer, slicer, chat_template(folder, tokenizer), extractor)

    def token_id(self, modality: str) -> int:
        """The same for all: what stands around it tells them apart."""
        return int(self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_processor.unk))

    def check_medium(self, medium: Medium) -> None:
        """Refuse sounds too short for one token."""
        super().check_medium(medium)
        if isinstance(medium.data, Audio):
            # three frames give the first
            check_sound(medium, self.sampling_rate, None, 2 * int(self.processor.feature_extractor.hop_length) + 1)

    def processor_arguments(self, media: Mapping[str, Sequence[Medium]]) -> dict[str, Any]:
        """What was decoded, as it is."""
        return {
            "images": [m.data.pixels for m in media.get("image", ()) if isinstance(m.data, Image)],
            "videos": [m.data.frames for m in media.get("video", ()) if isinstance(m.data, Video)],
            "audio": [m.data.samples for m in media.get("audio", ()) if isinstance(m.data, Audio)],
        }

    def split_features(
        self, batch: Mapping[str, Any], media: Mapping[str, Sequence[Medium]]
    ) -> dict[str, list[Tensors]]:
        """Per medium.

        Pictures and videos: ``patches`` uint8 [patches, channels, side, side] of all pieces, ``sizes`` int64
        [pieces, 2] (rows and columns of patches), ``values`` float32 [channels, 256] (of each byte). Sounds: ``mel``
        float32 [bins, frames] of all pieces, ``lengths`` int64 [pieces].
        """
        slicer = self.processor.image_processor
        values, side = slicer.values(), slicer.patch_size
        out: dict[str, list[Tensors]] = {}
        for modality, name in (("image", "images"), ("video", "videos")):
            if modality in media:
                out[modality] = [
                    {
                        "patches": np.concatenate([slicer.patches(piece) for piece in pieces]),
                        "sizes": np.array([[piece.shape[0] // side, piece.shape[1] // side] for piece in pieces]),
                        "values": values,
                    }
                    for pieces in batch[name]
                ]
        if "audio" in media:
            out["audio"] = [
                {"mel": np.concatenate(mels, axis=1), "lengths": np.array([mel.shape[1] for mel in mels])}
                for mels in batch["audio"]
            ]
        return out

    def num_rows(self, modality: str, tensors: Tensors) -> int:
        """One for each query of each piece; of a sound a quarter of its frames."""
        if modality == "audio":
            return sum(sound_rows(int(length)) for length in tensors["lengths"])
        return len(tensors["sizes"]) * int(self.config.queries)


class MiniCPMOPreprocessor(MiniCPMPreprocessor):
    """Sounds as well."""

    hears = True


class Resampler(nn.Module):
    """Learnt queries that look at all patches of a piece once."""

    def __init__(self, queries: int, width: int, patch_width: int) -> None:
        """Args: how many; columns of a row and of a patch."""
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(patch_width, width, bias=False) if patch_width != width else nn.Identity()
        self.attn = nn.MultiheadAttention(width, width // 128)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, patches: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Patches [rows * columns, patch width] of each piece, its rows and columns -> [pieces, queries, width]."""
        values = self.ln_kv(self.kv_proj(pad_sequence(list(patches)))).to(self.proj.dtype)
        places = [grid_positions(rows, columns, self.proj.shape[0]).to(values) for rows, columns in sizes]
        lengths = torch.tensor([len(part) for part in patches], device=values.device)
        behind = torch.arange(len(values), device=values.device) >= lengths[:, None]
        queries = self.ln_q(self.query)[:, None].expand(-1, len(patches), -1)
        out, _ = self.attn(queries, values + pad_sequence(places), values, key_padding_mask=behind, need_weights=False)
        seen: torch.Tensor = self.ln_post(out.transpose(0, 1)) @ self.proj
        return seen


class AudioProjector(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, rows_width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, rows_width)
        self.linear2 = nn.Linear(rows_width, rows_width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width of a row]."""
        out: torch.Tensor = self.linear2(functional.relu(self.linear1(states)))
        return out


class MiniCPMModel(Composite):
    """Tower, resampler, text model; Whisper's encoder and a projector where there is ``audio_config``."""

    published: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^llm\.model\.", "language_model."),
        (r"^llm\.lm_head\.", "lm_head."),
    )

    def build(self, config: Any) -> None:
        """Add the encoders."""
        width = config.text_config.hidden_size
        self.vpm = block("minicpmv4_6", "MiniCPMV4_6VisionModel")(config.vision_config)
        # of MiniCPM-V 4.6 alone
        self.vpm.vit_merger = nn.Identity()
        self.resampler = Resampler(config.queries, width, config.vision_config.hidden_size)
        if config.audio_config is not None:
            self.apm = block("whisper", "WhisperEncoder")(config.audio_config)
            # the published model takes a quarter of the inner width, which is the outer one
            self.audio_projection_layer = AudioProjector(config.audio_config.encoder_ffn_dim // 4, width)

    def get_image_features(self, pixels: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Patches [patches, channels, side, side] of all pieces, int64 [pieces, 2] -> [pieces, queries, width]."""
        tower, counts = self.vpm, sizes.prod(-1).tolist()
        table = tower.embeddings.position_embedding
        places = torch.cat(
            [table_rows(rows, columns, tower.embeddings.num_patches_per_side) for rows, columns in sizes.tolist()]
        )
        states = tower.embeddings.patch_embedding(pixels).flatten(1) + table(places.to(pixels.device))
        bounds = functional.pad(torch.tensor(counts).cumsum(0), (1, 0)).to(pixels.device, torch.int32)
        out = tower.encoder(inputs_embeds=states[None], cu_seqlens=bounds, max_seqlen=max(counts)).last_hidden_state
        seen: torch.Tensor = self.resampler(tower.post_layernorm(out)[0].split(counts), sizes.tolist())
        return seen

    def get_audio_features(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Frames [bins, frames] of each piece -> rows [n, width] of each piece, as if it were alone."""
        tower = self.apm
        states = []
        for mel in mels:
            heard = functional.gelu(tower.conv2(functional.gelu(tower.conv1(mel[None]))))[0].T
            states.append(heard + tower.embed_positions.weight[: len(heard)])
        lengths = torch.tensor([len(part) for part in states], device=states[0].device)
        x = pad_sequence(states, batch_first=True)
        index = torch.arange(x.shape[1], device=x.device)
        seen = (index < lengths[:, None])[:, None, None]
        if chunk := int(self.config.audio_chunk_length * _FRAMES_A_SECOND):
            seen = seen & (index // chunk <= (index // chunk)[:, None])
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)
        mask = mask.expand(-1, -1, x.shape[1], -1)
        for layer in tower.layers:
            x = layer(x, mask)
        rows = self.audio_projection_layer(tower.layer_norm(x)).transpose(1, 2)
        pooled = functional.avg_pool1d(rows, self.config.audio_pool_step).transpose(1, 2)
        return [
            part[: length // self.config.audio_pool_step] for part, length in zip(pooled, lengths.tolist(), strict=True)
        ]


class MiniCPMVisionEncoder(TransformersEncoder):
    """Tower and resampler."""

    def __init__(self, model: Any, device: str, dtype: torch.dtype) -> None:
        super().__init__(model, device, dtype)
        if self.device.type == "cuda":
            use_packed_attention(model.vpm)

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pieces of all items in one run."""
        pixels = torch.cat([self._pixels(item) for item in items])
        sizes = torch.from_numpy(np.concatenate([item.tensors["sizes"] for item in items]))
        return self.base.get_image_features(pixels, sizes)

    def _pixels(self, item: EncoderItem) -> torch.Tensor:
        """[patches, channels, side, side] in the tower's dtype."""
        patches, values = self.to_device(item.tensors["patches"]), self.to_device(item.tensors["values"])
        channels = torch.arange(len(values), device=self.device)[:, None, None]
        return values[channels, patches.int()].to(self.dtype)


class MiniCPMAudioEncoder(TransformersEncoder):
    """Whisper's encoder and the projector."""

    def features(self, modality: str, items: Sequence[EncoderItem]) -> Any:
        """All pieces of all items in one run."""
        mels: list[torch.Tensor] = []
        for item in items:
            mel = self.to_device(item.tensors["mel"]).to(self.dtype)
            mels.extend(torch.split(mel, item.tensors["lengths"].tolist(), dim=1))
        return self.base.get_audio_features(mels)


class MiniCPMV(CompositeFamily):
    """MiniCPM-V 2.6."""

    composite = MiniCPMModel
    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vpm", "resampler")}
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = MiniCPMPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {"vision": MiniCPMVisionEncoder}

    def load_config(self) -> Any:
        """The text model's values lie beside ``vision_config``."""
        raw = self.checkpoint.config
        if str(raw.get("version")) != "2.6":
            raise TriptychError(
                ErrorKind.UNSUPPORTED,
                f"this {self.checkpoint.model_type} checkpoint is version {raw.get('version')!r}; supported: 2.6",
                "settings.model",
            )
        vision = dict(required(raw, "vision_config"))
        vision.pop("model_type", None)
        layers = vision.pop("num_hidden_layers", 27) - bool(raw.get("drop_vision_last_layer", False))
        return CompositeConfig(
            text_config=text_config("qwen2", raw),
            vision_config=model_class("MiniCPMV4_6VisionConfig")(num_hidden_layers=layers, **vision),
            audio_config=self.audio_config(),
            queries=raw.get("query_num", 64),
            audio_chunk_length=raw.get("audio_chunk_length", 1.0),
            audio_pool_step=raw.get("audio_pool_step", 2),
        )

    def audio_config(self) -> Any:
        """None: it takes no sounds."""
        return None


class MiniCPMO(MiniCPMV):
    """MiniCPM-o 2.6 without its voice."""

    towers: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vpm", "resampler"),
        "audio": ("apm", "audio_projection_layer"),
    }
    modality_encoders: ClassVar[Mapping[str, str]] = {"image": "vision", "video": "vision", "audio": "audio"}
    preprocessor_class: ClassVar[type[TransformersPreprocessor]] = MiniCPMOPreprocessor
    encoder_classes: ClassVar[Mapping[str, type[TransformersEncoder]]] = {
        "vision": MiniCPMVisionEncoder,
        "audio": MiniCPMAudioEncoder,
    }

    def audio_config(self) -> Any:
        """Whisper's."""
        return model_class("WhisperConfig")(**required(self.checkpoint.config, "audio_config"))


def grid_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """Sines and cosines of a grid's columns, then of its rows: float32 [rows * columns, width]."""
    quarter = width // 4
    speed = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None].float() * speed for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def table_rows(rows: int, columns: int, side: int) -> torch.Tensor:
    """For each patch of a grid the nearest place of the square table of positions: int64 [rows * columns]."""
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    # the published step is a float32
    down, across = (
        torch.bucketize(torch.arange(0, 1 - 1e-6, float(1 / torch.tensor(n))), bounds, right=True)
        for n in (rows, columns)
    )
    return (down[:, None] * side + across).flatten()
