"""The processor of MiniCPM-V 2.6 and MiniCPM-o 2.6 (OpenBMB), whose checkpoints bring theirs along as code.

A picture becomes an overview and, where it has more pixels than one square, up to nine slices of a grid near its own
aspect ratio (Yao et al. 2024, arXiv:2408.01800). Each of them is as many ``<unk>`` tokens as the resampler has
queries. Compared with the published processor: sizes, grids, order of slices, placeholders and normalised values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class Slicer:
    """Pictures -> overviews and slices, with the values of preprocessor_config.json."""

    max_slice_nums: int = 9
    scale_resolution: int = 448
    patch_size: int = 14
    slice_mode: bool = True
    use_image_id: bool = True
    image_feature_size: int = 64
    norm_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    norm_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    im_start: str = "<image>"
    im_end: str = "</image>"
    slice_start: str = "<slice>"
    slice_end: str = "</slice>"
    im_id_start: str = "<image_id>"
    im_id_end: str = "</image_id>"
    unk: str = "<unk>"
    # of a video: its frames are pictures
    fps: float = 1.0
    min_frames: int = 1
    max_frames: int = 64
    frame_slice_nums: int = 2

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Slicer:
        """Of the keys of preprocessor_config.json that it knows."""
        known: dict[str, Any] = {key: options[key] for key in cls.__dataclass_fields__ if key in options}
        for key in ("norm_mean", "norm_std"):
            if key in known:
                known[key] = tuple(known[key])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """All options."""
        return asdict(self)

    def grid(self, size: Size, limit: int) -> Size | None:
        """Columns and rows of slices, or None where the overview is all there is.

        Of the grids with about as many cells as the picture has squares of pixels, the one whose aspect ratio is
        nearest on a logarithmic scale; the first of equals.
        """
        if not self.slice_mode:
            return None
        squares = min(math.ceil(size[0] * size[1] / self.scale_resolution**2), limit)
        if squares <= 1:
            return None
        aspect = math.log(size[0] / size[1])
        counts = [n for n in (squares - 1, squares, squares + 1) if 1 < n <= limit]
        grids = [(columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
        return min(grids, key=lambda grid: abs(aspect - math.log(grid[0] / grid[1])))

    def pieces(self, picture: PILImage.Image, limit: int) -> list[NDArray[np.uint8]]:
        """The overview and the slices, row by row: uint8 [height, width, 3], sides multiples of the patch."""
        if not self.slice_mode:
            return [np.asarray(picture)]
        grid = self.grid(picture.size, limit)
        overview = self._resized(picture, self._fitted(picture.size, enlarge=grid is None))
        if grid is None:
            return [overview]
        cell = (_multiple(picture.width, grid[0]) / grid[0], _multiple(picture.height, grid[1]) / grid[1])
        width, height = self._fitted(cell, enlarge=True)
        whole = self._resized(picture, (width * grid[0], height * grid[1]))
        cells = [
            whole[row * height : (row + 1) * height, column * width : (column + 1) * width]
            for row in range(grid[1])
            for column in range(grid[0])
        ]
        return [overview, *cells]

    def values(self) -> NDArray[np.float32]:
        """What each byte becomes: float32 [channels, 256]."""
        scaled = np.arange(256, dtype=np.uint8).astype(np.float32) / 255
        mean, std = np.array(self.norm_mean, dtype=np.float32), np.array(self.norm_std, dtype=np.float32)
        out: NDArray[np.float32] = (scaled - mean[:, None]) / std[:, None]
        return out

    def patches(self, piece: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """[height, width, 3] -> [patches, 3, patch, patch], row by row."""
        side = self.patch_size
        rows, columns = piece.shape[0] // side, piece.shape[1] // side
        cut = piece[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
        return cut.transpose(0, 2, 4, 1, 3).reshape(rows * columns, 3, side, side)

    def placeholder(self, size: Size, limit: int, number: int | None) -> str:
        """Text that stands for a picture; ``number`` counts the pictures of a prompt, None for frames."""
        queries = self.unk * self.image_feature_size
        text = f"{self.im_start}{queries}{self.im_end}"
        if self.use_image_id and number is not None:
            text = f"{self.im_id_start}{number}{self.im_id_end}{text}"
        if grid := self.grid(size, limit):
            row = f"{self.slice_start}{queries}{self.slice_end}" * grid[0]
            text += "\n".join([row] * grid[1])
        return text

    def _fitted(self, size: tuple[float, float], *, enlarge: bool) -> Size:
        """About as many pixels as a square, sides multiples of the patch; only smaller unless it may be enlarged."""
        width, height = size
        if enlarge or width * height > self.scale_resolution**2:
            ratio = width / height
            height = int(self.scale_resolution / math.sqrt(ratio))
            width = int(height * ratio)
        return _multiple(width, self.patch_size), _multiple(height, self.patch_size)

    def _resized(self, picture: PILImage.Image, size: Size) -> NDArray[np.uint8]:
        return np.asarray(picture.resize(size, resample=PILImage.Resampling.BICUBIC))


def _multiple(length: float, of: int) -> int:
    return max(round(length / of) * of, of)


class MiniCPMProcessor:
    """Called like a processor of transformers: text with placeholders, pictures, videos and sounds in their order.

    The placeholders consist of special tokens, which nobody's text holds.
    """

    def __init__(self, tokenizer: Any, slicer: Slicer, template: str | None, feature_extractor: Any = None) -> None:
        """Args: its parts; the chat template, which takes texts; Whisper's feature extractor (MiniCPM-o)."""
        self.tokenizer = tokenizer
        self.image_processor = self.video_processor = slicer
        self.feature_extractor = feature_extractor
        self.chat_template = template
        self.audio_start, self.audio_end = "<|audio_start|>", "<|audio_end|>"
        self.image_token = f"{slicer.im_start}./{slicer.im_end}"
        self.video_token = f"{slicer.slice_start}./{slicer.slice_end}"
        self.audio_token = f"{self.audio_start}./{self.audio_end}"
        self._any = re.compile("|".join(map(re.escape, (self.image_token, self.video_token, self.audio_token))))

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """The published template takes texts: parts of a message are lines of one."""
        turns = [{**message, "content": self._lines(message["content"])} for message in conversation]
        return self.tokenizer.apply_chat_template(turns, chat_template=self.chat_template, **options)

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[PILImage.Image] = (),
        videos: Sequence[NDArray[np.uint8]] = (),
        audio: Sequence[NDArray[np.float32]] = (),
        **options: Any,
    ) -> dict[str, Any]:
        """Token ids, and per medium its pieces.

        Args:
            text: one prompt.
            images, videos: as they are, videos [frames, height, width, 3].
            audio: samples at the feature extractor's rate.
            options: of the tokenizer.

        Returns:
            ``input_ids``, and for each kind that is given "images", "videos" (per medium uint8 pieces) and "audio"
            (per medium the frames of each half minute, float32 [bins, frames]).
        """
        slicer = self.image_processor
        frames = [[PILImage.fromarray(frame) for frame in video] for video in videos]
        texts = {
            self.image_token: iter(
                [slicer.placeholder(p.size, slicer.max_slice_nums, number) for number, p in enumerate(images)]
            ),
            self.video_token: iter(
                ["\n".join(slicer.placeholder(f.size, slicer.frame_slice_nums, None) for f in v) for v in frames]
            ),
            self.audio_token: iter([self._sound_placeholder(len(samples)) for samples in audio]),
        }
        written = self._any.sub(lambda match: _next(texts[match[0]], match[0]), text[0])
        if left := [kind for kind, rest in texts.items() if next(rest, None) is not None]:
            raise ValueError(f"the prompt lacks a placeholder {left[0]}")
        out = dict(self.tokenizer([written], **options))
        if images:
            out["images"] = [slicer.pieces(picture, slicer.max_slice_nums) for picture in images]
        if videos:
            out["videos"] = [[p for f in video for p in slicer.pieces(f, slicer.frame_slice_nums)] for video in frames]
        if audio:
            out["audio"] = [list(self._mels(samples)) for samples in audio]
        return out

    def _lines(self, content: Any) -> str:
        if isinstance(content, str):
            return content
        tokens = {"image": self.image_token, "video": self.video_token, "audio": self.audio_token}
        return "\n".join(part["text"] if part["type"] == "text" else tokens[part["type"]] for part in content)

    def _sound_placeholder(self, samples: int) -> str:
        """A pair of marks for every second."""
        rows, second = sound_rows(math.ceil(samples / self.feature_extractor.hop_length)), sound_rows(100)
        counts = [min(second, rows - start) for start in range(0, rows, second)]
        return "".join(self.audio_start + self.image_processor.unk * count + self.audio_end for count in counts)

    def _mels(self, samples: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        extractor = self.feature_extractor
        for start in range(0, len(samples), extractor.n_samples):
            piece = samples[start : start + extractor.n_samples]
            mel = extractor(piece, sampling_rate=extractor.sampling_rate, padding="max_length", return_tensors="np")
            yield mel["input_features"][0][:, : math.ceil(len(piece) / extractor.hop_length)]


def sound_rows(frames: int) -> int:
    """Embedding rows of log-mel frames: a strided convolution, then pooling in pairs."""
    return ((frames - 1) // 2 + 1) // 2


def _next(texts: Iterator[str], kind: str) -> str:
    found = next(texts, None)
    if found is None:
        raise ValueError(f"the prompt has more placeholders {kind} than media")
    return found
