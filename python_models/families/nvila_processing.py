"""The processors of NVILA and NVILA-Lite (NVIDIA), whose checkpoints bring theirs along as code.

A picture alone in its request is cut into tiles; pictures beside others, and the frames of a video, are one tile each.
With dynamic S2 (NVILA) the tiles are those of the whole picture at once, twice and about three times the tower's size;
without it (NVILA-Lite) those of one grid and the whole. After the rows of every tile, or of the picture that tiles are
merged to, comes a line feed, a token of its own. Compared with the published processors and with VILA's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from .pixels import RAW
from .prompt import join_parts, renders_parts

Blocks = tuple[int, int]
"""Rows and columns of tiles."""


@dataclass(frozen=True)
class Tiles:
    """What is seen of a medium.

    Attributes:
        pixels: uint8 [tiles, channels, side, side].
        blocks: of the largest scale; None for tiles that are not merged.
        rows: embedding rows of each run of tokens that a line feed follows.
    """

    pixels: NDArray[np.uint8]
    blocks: Blocks | None
    rows: tuple[int, ...]


class NVILAProcessor:
    """Called like a processor of transformers."""

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        template: str | None,
        *,
        tile_rows: int,
        scales: Sequence[int],
        strips: bool,
    ) -> None:
        """Its parts.

        Args:
            tokenizer: has ``image_token`` and ``video_token``, or "<image>" and "<vila/video>".
            image_processor: of SigLIP.
            template: the chat template.
            tile_rows: embedding rows of a tile.
            scales: of dynamic S2, in tiles; none: one grid and the whole.
            strips: messages are written without blanks around them, and as texts whatever the template takes.
        """
        self.tokenizer = tokenizer
        self.image_token = str(getattr(tokenizer, "image_token", None) or "<image>")
        self.video_token = str(getattr(tokenizer, "video_token", None) or "<vila/video>")
        # VILA adds them where a tokenizer was saved without
        tokenizer.add_tokens([self.image_token, self.video_token], special_tokens=True)
        self.image_processor = self.video_processor = image_processor
        self.chat_template = template
        self.scales = tuple(scales)
        self._tile_rows = tile_rows
        self._side = int(image_processor.size["height"])
        (self._line_feed,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
        self._strips = strips
        self._tokens = {"image": self.image_token, "video": self.video_token}
        render = functools.partial(tokenizer.apply_chat_template, chat_template=template)
        self._takes_parts = not strips and renders_parts(render, self._tokens)

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """A template that takes texts gets the parts of a message as one."""
        if not self._takes_parts:
            texts = [join_parts(message["content"], self._tokens) for message in conversation]
            conversation = [
                {**message, "content": text.strip() if self._strips else text}
                for message, text in zip(conversation, texts, strict=True)
            ]
        return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **options)

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[PILImage.Image] = (),
        videos: Sequence[NDArray[np.uint8]] = (),
        **options: Any,
    ) -> dict[str, Any]:
        """Token ids, and per medium its tiles.

        Args:
            text: one prompt.
            images, videos: as they are, videos [frames, height, width, 3].
            options: of the tokenizer.

        Returns:
            ``input_ids`` [1][L], ``images`` and ``videos``: :class:`Tiles` of each.
        """
        pictures = [self._alone(images[0])] if len(images) == 1 else [self._plain([image]) for image in images]
        clips = [self._plain([PILImage.fromarray(frame) for frame in video]) for video in videos]
        # the published processor writes a tile of a grid as a line of its own
        end = "" if self.scales or len(images) != 1 else "\n"
        written = self._repeat(text[0], self.image_token, pictures, end)
        written = self._repeat(written, self.video_token, clips, "")
        ids = self.tokenizer([written], **{**options, "return_tensors": None})["input_ids"][0]
        rows = {
            self.tokenizer.convert_tokens_to_ids(token): iter([n for tiles in seen for n in tiles.rows])
            for token, seen in ((self.image_token, pictures), (self.video_token, clips))
        }
        out: list[int] = []
        for token in ids:
            out += [token] * next(rows[token]) + [self._line_feed] if token in rows else [token]
        return {"input_ids": [out], "images": pictures, "videos": clips}

    def _alone(self, picture: PILImage.Image) -> Tiles:
        if not self.scales:
            columns, rows = nearest_grid(picture.size, 1, 12, self._side)
            tiles = self._cut(picture, columns, rows)
            if len(tiles) > 1:
                tiles.append(picture.resize((self._side, self._side)))
            return Tiles(self._pixels(tiles), None, (self._tile_rows,) * len(tiles))
        tiles = [tile for scale in self.scales[:-1] for tile in self._cut(picture, scale, scale)]
        columns, rows = nearest_grid(picture.size, self.scales[-1] ** 2, 12, self._side)
        tiles += self._cut(picture, columns, rows)
        return Tiles(self._pixels(tiles), (rows, columns), (self._tile_rows * rows * columns,))

    def _plain(self, pictures: Sequence[PILImage.Image]) -> Tiles:
        return Tiles(self._pixels(pictures), None, (self._tile_rows,) * len(pictures))

    def _cut(self, picture: PILImage.Image, columns: int, rows: int) -> list[PILImage.Image]:
        """Row by row."""
        side = self._side
        whole = picture.resize((columns * side, rows * side))
        return [
            whole.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
            for row in range(rows)
            for column in range(columns)
        ]

    def _pixels(self, pictures: Sequence[PILImage.Image]) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = self.image_processor(list(pictures), return_tensors="pt", **RAW)[
            "pixel_values"
        ].numpy()
        return pixels

    def _repeat(self, text: str, token: str, media: Sequence[Tiles], end: str) -> str:
        """Every placeholder once for each run of rows."""
        pieces = text.split(token)
        if len(pieces) != len(media) + 1:
            raise ValueError(f"the prompt has {len(pieces) - 1} placeholders {token} for {len(media)} media")
        return pieces[0] + "".join(
            (token + end) * len(tiles.rows) + piece for tiles, piece in zip(media, pieces[1:], strict=True)
        )


def nearest_grid(size: tuple[int, int], fewest: int, most: int, side: int) -> tuple[int, int]:
    """Columns and rows of the grid whose aspect ratio is nearest to a picture's.

    Of two as near the later one, with no fewer tiles, where the picture has more than half its pixels.

    Args:
        size: width and height of the picture.
        fewest, most: tiles.
        side: of a tile.
    """
    grids = [(i, n // i) for n in range(fewest, most + 1) for i in range(1, n + 1) if n % i == 0]
    best, least = (1, 1), float("inf")
    for grid in grids:
        distance = abs(size[0] / size[1] - grid[0] / grid[1])
        tie = distance == least and size[0] * size[1] > 0.5 * side * side * grid[0] * grid[1]
        if distance < least or tie:
            best, least = grid, distance
    return best
