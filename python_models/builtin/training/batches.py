"""Training batches: samples of one size, their conversations as token rows, and dense labels of what is where."""

# mypy: disable-error-code="no-untyped-call,no-any-return"
# (torch and transformers leave many methods untyped)

import random
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from . import data, model, questions, speech
from .data import CHARACTERS, COLOURS, SHAPES, Scene
from .model import MERGE, PATCH, Grid
from .questions import Turn
from .speech import Array

SYSTEM = [
    "You are a helpful assistant.",
    "You are a helpful AI model.",
    "Answer the user's question.",
    "You are Triptych.",
    "Be brief.",
    "You look at pictures and answer questions.",
    "Answer in one word.",
    "You are an assistant.",
]
COLOUR_NAMES = tuple(COLOURS)
SOUND_LABELS = 14  # nothing, ten digits, three tones
PIXELS_PER_BATCH = 14_000_000


@dataclass
class Batch:
    """Samples of one shape.

    Attributes:
        media: uint8 [n, 1, h, w, 4] for each picture (the fourth channel says what is drawn),
            [n, frames, h, w, 3] for a clip, or float32 [n, samples].
        ids: [n, t].
        positions: [3, n, t].
        asked, target: the flat places [k] before answer tokens, and those tokens [k].
        where: for each media the flat places of its tokens.
        tasks: for each row (task, first token, last token) of its answers.
        cells, glyphs: labels [n, tokens, 4, 3] and [n, tokens, 16] of the patches of the first picture.
        spans: labels [n, tokens] of a sound.
        extra: the seconds between two time steps of each clip.
    """

    kind: str
    media: list[Any]
    ids: Any
    positions: Any
    asked: Any
    target: Any
    where: list[Any]
    tasks: list[list[tuple[str, int, int]]]
    cells: Array | None = None
    glyphs: Array | None = None
    spans: Array | None = None
    extra: dict[str, Array] = field(default_factory=dict)


class Rows:
    """Turns conversations into token rows as the chat template and the processor would."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        convert: Any = tokenizer.convert_tokens_to_ids
        self.special: dict[str, int] = {s: convert(s) for s in model.SPECIAL}
        self.split = re.compile("(" + "|".join(re.escape(s) for s in model.SPECIAL) + ")")
        self.memory: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids; pieces between special tokens are remembered."""
        ids: list[int] = []
        for piece in self.split.split(text):
            if piece in self.special:
                ids.append(self.special[piece])
            elif piece:
                if piece not in self.memory:
                    if len(self.memory) > 200_000:
                        self.memory.clear()
                    self.memory[piece] = self.tokenizer.encode(piece, add_special_tokens=False)
                ids += self.memory[piece]
        return ids

    def row(self, rng: random.Random, turns: list[Turn], media: str) -> tuple[list[int], list[tuple[str, int, int]]]:
        """The ids of a conversation whose first message holds `media`, and (task, first, last) of each answer."""
        ids: list[int] = []
        answers = []
        if rng.random() < 0.25:
            ids += self.encode(f"<|im_start|>system\n{rng.choice(SYSTEM)}<|im_end|>\n")
        for i, turn in enumerate(turns):
            question = turn.question
            if i == 0 and media:
                gap = rng.choice(("", "", "", "\n", " "))
                question = media + gap + question if rng.random() < 0.7 else question + gap + media
            ids += self.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
            answer = self.encode(f"{turn.answer}<|im_end|>")
            answers.append((turn.task, len(ids), len(ids) + len(answer)))
            ids += answer + self.encode("\n")
        return ids, answers

    def batch(
        self,
        rng: random.Random,
        kind: str,
        conversations: list[list[Turn]],
        media: list[Array],
        shapes: list[Grid | int],
        seconds: Array | None = None,
    ) -> Batch:
        """Rows of one batch; `shapes` are the grids (or numbers of sound tokens) of the media of every row."""
        names = {
            "picture": ("vision", "image"),
            "pair": ("vision", "image"),
            "clip": ("vision", "video"),
            "sound": ("audio", "audio"),
        }
        counts = [s if isinstance(s, int) else s.tokens for s in shapes]
        pads = []
        for count in counts:
            outer, inner = names[kind]
            pads.append(f"<|{outer}_start|>" + f"<|{inner}_pad|>" * count + f"<|{outer}_end|>")
        rows = [self.row(rng, turns, "".join(pads)) for turns in conversations]
        length = (max(len(ids) for ids, _ in rows) + 15) // 16 * 16
        ids = np.full((len(rows), length), self.special["<|pad|>"], np.int64)
        target = np.full(ids.shape, -1, np.int64)
        positions = np.zeros((3, *ids.shape), np.int64)
        where: list[list[Array]] = [[] for _ in counts]
        marks = {self.special[name] for name in ("<|image_pad|>", "<|video_pad|>", "<|audio_pad|>")}
        for i, (row, answers) in enumerate(rows):
            ids[i, : len(row)] = row
            for _, first, last in answers:
                target[i, first - 1 : last - 1] = row[first:last]
            at = position = 0
            for n, shape in enumerate(shapes):
                start = next(j for j in range(at, len(row)) if row[j] in marks)
                positions[:, i, at:start] = np.arange(position, position + start - at)
                position += start - at
                block = media_positions(shape, None if seconds is None else float(seconds[i]))
                positions[:, i, start : start + counts[n]] = block + position
                where[n].append(np.arange(i * length + start, i * length + start + counts[n]))
                position += int(block.max()) + 1
                at = start + counts[n]
            positions[:, i, at:] = np.arange(position, position + length - at)
        flat = [np.concatenate(w) for w in where]
        extra = {} if seconds is None else {"seconds": seconds}
        asked = np.flatnonzero(target >= 0)
        return Batch(
            kind,
            media,
            ids,
            positions,
            asked,
            target.flatten()[asked],
            flat,
            [answers for _, answers in rows],
            extra=extra,
        )


def media_positions(shape: Grid | int, seconds: float | None) -> Array:
    """Rotary positions [3, tokens] of one picture, clip (`seconds` apart) or sound, from zero."""
    if isinstance(shape, int):
        return np.broadcast_to(np.arange(shape), (3, shape))
    times = np.arange(shape.time)
    if seconds is not None:
        times = (times.astype(np.float32) * np.float32(seconds) * model.POSITIONS_PER_SECOND).astype(np.int64)
    h, w = shape.height // MERGE, shape.width // MERGE
    return np.stack(np.broadcast_arrays(times[:, None, None], np.arange(h)[:, None], np.arange(w))).reshape(3, -1)


def label_cells(scene: Scene, grid: Grid) -> tuple[Array, Array]:
    """Labels of patches: shape, colour (0 is none) and centre or not [tokens, 4, 3], and characters [tokens, 16]."""
    sx, sy = grid.width / scene.width, grid.height / scene.height
    scale, fine = 2 * (sx + sy), 4
    cover = Image.new("L", (grid.width * fine, grid.height * fine))
    canvas = ImageDraw.Draw(cover)
    centre = np.zeros((grid.height, grid.width), np.uint8)
    for i, shape in enumerate(scene.shapes):
        data.draw_outline(canvas, shape, scale, shape.x * (fine * sx - scale), shape.y * (fine * sy - scale), i + 1)
    which = np.array(cover)[fine // 2 :: fine, fine // 2 :: fine]
    for i, shape in enumerate(scene.shapes):
        at = min(grid.height - 1, int(shape.y * sy)), min(grid.width - 1, int(shape.x * sx))
        which[at], centre[at] = i + 1, 1
    kinds = np.array([0] + [1 + SHAPES.index(s.kind) for s in scene.shapes], np.uint8)
    colours = np.array([0] + [1 + COLOUR_NAMES.index(s.colour) for s in scene.shapes], np.uint8)
    cells = np.stack([kinds[which], colours[which], centre], -1)
    letters = np.zeros((2 * grid.height, 2 * grid.width), np.uint8)
    for character, left, top, right, bottom in scene.glyphs:
        x0, x1 = (round(2 * sx * v) for v in (left, right))
        y0, y1 = (round(2 * sy * v) for v in (top, bottom))
        letters[max(0, y0) : max(y1, y0 + 1), max(0, x0) : max(x1, x0 + 1)] = 1 + CHARACTERS.index(character)
    h, w = grid.height // MERGE, grid.width // MERGE
    cells = cells.reshape(h, 2, w, 2, 3).transpose(0, 2, 1, 3, 4).reshape(h * w, 4, 3)
    return cells, letters.reshape(h, 4, w, 4).transpose(0, 2, 1, 3).reshape(h * w, 16)


class Maker:
    """Makes batches; `progress` in 0..1 drives the curriculum of printed text."""

    def __init__(self, tokenizer: Any, voices: list[list[Array]]):
        self.rows, self.voices = Rows(tokenizer), voices

    def make(self, kind: str, seed: int, progress: float, share: float = 1.0) -> Batch:
        """A batch of a kind: picture, clip, sound, pair or talk."""
        return getattr(self, kind)(random.Random(seed), progress, share)

    def shot(self, rng: random.Random, scene: Scene, width: int, height: int) -> Array:
        """The picture resized as the processor would: uint8 [1, height, width, 4]."""
        picture, cover = data.render(scene)
        if rng.random() < 0.2:
            if rng.random() < 0.6:
                picture = data.add_noise(rng, picture, cover)
            picture = data.through_jpeg(picture, rng.randint(50, 95))
            cover = Image.new("L", picture.size, 255)
        if picture.size != (width, height):
            picture, cover = (
                picture.resize((width, height), Image.Resampling.BICUBIC),
                cover.resize((width, height), Image.Resampling.BILINEAR),
            )
        picture.putalpha(cover)
        return np.asarray(picture)[None]

    def scene(self, rng: random.Random, grid: tuple[int, int], factor: float, progress: float) -> Scene:
        """A scene for a grid of pixels; `factor` is how much larger the file would be."""
        native = rng.random() < (0.15 if abs(factor - 1) < 0.06 else 0.4)
        width, height = (max(64, round(g * factor)) for g in grid) if native else grid
        scale = 1.0 if native else factor
        if rng.random() < 0.5:
            early = max(0.0, 1 - progress / 0.2)
            smallest = max((21 + 20 * early) / scale, 18 * early)
            longest = 6 if progress > 0.12 else 2 if progress < 0.05 else 4
            return data.text_scene(rng, width, height, smallest, longest)
        return data.shapes_scene(rng, width, height, floor=8 / scale)

    def picture(self, rng: random.Random, progress: float, share: float) -> Batch:
        """Single pictures, five questions each."""
        size = data.picture_size(rng)
        grid = model.smart_resize(*size, model.MIN_PIXELS, model.MAX_PIXELS)
        factor = (size[0] * size[1] / (grid[0] * grid[1])) ** 0.5
        count = max(4, int(share * min(320, PIXELS_PER_BATCH // (grid[0] * grid[1]))))
        scenes = [self.scene(rng, grid, factor, progress) for _ in range(count)]
        media = [np.stack([self.shot(rng, scene, *grid) for scene in scenes])]
        patches = Grid(1, grid[1] // PATCH, grid[0] // PATCH)
        turns = [questions.scene_turns(rng, scene, 5) for scene in scenes]
        batch = self.rows.batch(rng, "picture", turns, media, [patches])
        batch.cells, batch.glyphs = map(np.stack, zip(*(label_cells(scene, patches) for scene in scenes), strict=True))
        return batch

    def pair(self, rng: random.Random, progress: float, share: float) -> Batch:
        """Two pictures compared."""
        grids = []
        for _ in range(2):
            size = data.picture_size(rng, 64, 448)
            grids.append(model.smart_resize(*size, model.MIN_PIXELS, model.MAX_PIXELS))
        count = max(4, int(share * min(160, PIXELS_PER_BATCH // 2 // sum(w * h for w, h in grids))))
        pairs = []
        for _ in range(count):
            n = (1, 1) if rng.random() < 0.5 else (rng.randint(1, 4), rng.randint(1, 4))
            pairs.append(data.make_pair(rng, grids[0], grids[1], n))
        media = [np.stack([self.shot(rng, pair[i], *grids[i]) for pair in pairs]) for i in range(2)]
        patches = [Grid(1, h // PATCH, w // PATCH) for w, h in grids]
        batch = self.rows.batch(
            rng, "pair", [questions.pair_turns(rng, pair, 3) for pair in pairs], media, list(patches)
        )
        batch.cells, batch.glyphs = map(
            np.stack, zip(*(label_cells(pair[0], patches[0]) for pair in pairs), strict=True)
        )
        return batch

    def clip(self, rng: random.Random, progress: float, share: float) -> Batch:
        """Clips: frames as the server samples them from 1 to 6 s at 5 to 30 frames a second."""
        width, height = data.picture_size(rng, 96, 640)
        grid = model.smart_resize(width, height, model.VIDEO_MIN_PIXELS, model.VIDEO_MAX_PIXELS)
        frames = rng.choice((8, 8, 10, 12))
        moments, shots, seconds = [], [], []
        for _ in range(max(4, int(96 * share))):
            while True:
                duration, rate = rng.uniform(1, 6), rng.uniform(5, 30)
                total = max(2, round(duration * rate))
                duration = total / rate
                times, sampled = data.sample_times(duration, total, model.VIDEO_FPS, model.MIN_FRAMES, model.MAX_FRAMES)
                if len(times) == frames:
                    break
            moment = data.clip(rng, *grid)
            pixels = data.render_frames(rng, moment, times, rng.random() < 0.4)
            if rng.random() < 0.3:
                quality = rng.randint(30, 90)
                pixels = np.stack([np.asarray(data.through_jpeg(Image.fromarray(p), quality)) for p in pixels])
            moments.append(moment)
            shots.append(pixels)
            seconds.append(2 / sampled)
        media = np.stack(shots)
        patches = Grid(frames // 2, grid[1] // PATCH, grid[0] // PATCH)
        turns = [questions.clip_turns(rng, moment, 3) for moment in moments]
        return self.rows.batch(rng, "clip", turns, [media], [patches], np.array(seconds))

    def sound(self, rng: random.Random, progress: float, share: float) -> Batch:
        """Digits and tones of one length, 0.5 to 8 s."""
        frames = round(np.exp(rng.uniform(np.log(50), np.log(799))))
        length = frames * model.HOP
        sounds = [self.any_sound(rng, length) for _ in range(max(4, int(160 * share)))]
        media = np.stack([data.roughen(rng, sound.samples) for sound in sounds])
        tokens = model.sound_tokens(frames)
        batch = self.rows.batch(rng, "sound", [questions.sound_turns(rng, s, 3) for s in sounds], [media], [tokens])
        batch.spans = np.stack([label_sound(sound, tokens) for sound in sounds])
        return batch

    def any_sound(self, rng: random.Random, length: int) -> data.Sound:
        """A tone or spoken digits, in a clip of `length` samples."""
        return data.tone(rng, length) if rng.random() < 0.3 else data.digits(rng, length, self.voices)

    def talk(self, rng: random.Random, progress: float, share: float) -> Batch:
        """Conversations without media."""
        turns = [questions.talk_turns(rng, rng.randint(1, 4)) for _ in range(max(4, int(128 * share)))]
        return self.rows.batch(rng, "talk", turns, [], [])


def label_sound(sound: data.Sound, tokens: int) -> Array:
    """What is heard at each sound token: [tokens], 0 nothing, 1 to 10 digits, 11 to 13 tones."""
    labels = np.zeros(tokens, np.int64)
    if sound.tone:
        labels[:] = 11 + data.TONES.index(sound.tone)
    for digit, first, last in sound.spans:
        labels[first // 640 : max(first // 640 + 1, round(last / 640))] = 1 + digit
    return labels


def voices(part: str = "train") -> list[list[Array]]:
    """The digit clips of a set of voices."""
    return speech.load(str(speech.ASSETS / "speech.npz"), part)
