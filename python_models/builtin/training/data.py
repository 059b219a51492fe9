"""Synthetic pictures, clips and sounds, with the facts about each that questions are made of.

Everything is drawn from a `random.Random`, so a seed names a sample. Pixels are uint8 RGB, sound is float32 at 16 kHz.
"""

import functools
import io
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import speech
from .speech import ASSETS, Array

COLOURS = {
    "red": (220, 30, 30), "orange": (245, 135, 20), "yellow": (240, 220, 40), "green": (30, 160, 50),
    "blue": (40, 70, 220), "purple": (140, 40, 170), "black": (15, 15, 15), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
ACTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking", "changing colour")
TONES = ("rising", "falling", "steady")
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
CHARACTERS = LETTERS + DIGITS
RATE = speech.RATE
FONT_FOLDERS = (
    ASSETS / "fonts",
    *(Path("/usr/share/fonts/truetype") / n for n in ("dejavu", "liberation", "freefont")),
)

Colour = tuple[int, int, int]


@dataclass(slots=True)
class Shape:
    """One solid shape: centre, radius and turn in pixels and radians."""

    kind: str
    colour: str
    rgb: Colour
    x: float
    y: float
    radius: float
    turn: float


@dataclass(slots=True)
class Scene:
    """What a picture holds; `glyphs` are (character, left, top, right, bottom) boxes."""

    width: int
    height: int
    ground: Colour
    shapes: list[Shape] = field(default_factory=list)
    text: str = ""
    font: str = ""
    size: int = 0
    ink: Colour = (0, 0, 0)
    glyphs: list[tuple[str, float, float, float, float]] = field(default_factory=list)


@dataclass(slots=True)
class Clip:
    """A scene whose shapes act: `actions[i]` is what shape i does, `ends[i]` its last (x, y, radius, rgb, colour)."""

    scene: Scene
    actions: list[str]
    ends: list[tuple[float, float, float, Colour, str]]
    switch: float


@dataclass(slots=True)
class Sound:
    """A tone (`tone` is set) or spoken digits; `spans` are (digit, first sample, last sample)."""

    samples: Array
    tone: str = ""
    digits: str = ""
    spans: list[tuple[int, int, int]] = field(default_factory=list)


# ---- drawing ----


def corners(kind: str, radius: float, turn: float) -> list[tuple[float, float]]:
    """The polygon of a shape around (0, 0); a circle has none."""
    if kind == "square":
        return _ring([0.9 * radius] * 4, turn + math.pi / 4)
    if kind == "triangle":
        return _ring([radius] * 3, turn - math.pi / 2)
    if kind == "star":
        return _ring([radius, 0.42 * radius] * 5, turn - math.pi / 2)
    if kind == "diamond":
        return _ring([radius, 0.58 * radius] * 2, turn - math.pi / 2)
    arm, half = 0.95 * radius, 0.33 * 0.95 * radius
    points = [(-half, -arm), (half, -arm), (half, -half), (arm, -half), (arm, half), (half, half)]
    points += [(-x, -y) for x, y in points]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def _ring(radii: list[float], start: float) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [(r * math.cos(start + i * step), r * math.sin(start + i * step)) for i, r in enumerate(radii)]


def draw_outline(canvas: ImageDraw.ImageDraw, shape: Shape, scale: float, dx: float, dy: float, fill: int) -> None:
    """Fill the shape, scaled and then shifted, on a one-channel canvas."""
    x, y = shape.x * scale + dx, shape.y * scale + dy
    if shape.kind == "circle":
        r = 0.95 * shape.radius * scale
        canvas.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    else:
        points = corners(shape.kind, shape.radius * scale, shape.turn)
        canvas.polygon([(x + px, y + py) for px, py in points], fill=fill)


def paste_shape(picture: Image.Image, cover: Image.Image | None, shape: Shape) -> None:
    """Draw a shape with soft edges; `cover` [L] collects where something was drawn."""
    fine = 4 if shape.radius < 20 else 3 if shape.radius < 60 else 2
    side = int(2 * shape.radius) + 4
    left, top = int(shape.x - side / 2), int(shape.y - side / 2)
    mask = Image.new("L", (side * fine, side * fine))
    draw_outline(ImageDraw.Draw(mask), shape, fine, -left * fine, -top * fine, 255)
    mask = mask.reduce(fine)
    picture.paste(shape.rgb, (left, top), mask)
    if cover is not None:
        cover.paste(255, (left, top), mask)


@functools.cache
def fonts() -> tuple[str, ...]:
    """Paths of the fonts at hand, sorted by name: DejaVu, Liberation and FreeFont."""
    for folders in (FONT_FOLDERS[:1], FONT_FOLDERS[1:]):
        found = {path.name: str(path) for folder in folders for path in folder.glob("*.ttf")}
        found = {name: path for name, path in found.items() if "MathTeX" not in name and "ExtraLight" not in name}
        if found:
            return tuple(found[name] for name in sorted(found))
    raise SystemExit("No fonts: install fonts-dejavu-core, fonts-liberation and fonts-freefont-ttf.")


@functools.lru_cache(maxsize=1024)
def font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels."""
    return ImageFont.truetype(path, size)


def render(scene: Scene) -> tuple[Image.Image, Image.Image]:
    """The picture on its plain ground, and its cover: an [L] picture, 255 where something was drawn."""
    picture = Image.new("RGB", (scene.width, scene.height), scene.ground)
    cover = Image.new("L", picture.size)
    for shape in scene.shapes:
        paste_shape(picture, cover, shape)
    if scene.text:
        face = font(scene.font, scene.size)
        x, y = scene.glyphs[0][1:3]
        box = face.getbbox(scene.text)
        mask = Image.new("L", (int(box[2]) + 8, int(box[3] - box[1]) + 4))
        ImageDraw.Draw(mask).text((4, 2 - box[1]), scene.text, fill=255, font=face)
        picture.paste(scene.ink, (int(x) - 4, int(y) - 2), mask)
        cover.paste(255, (int(x) - 4, int(y) - 2), mask)
    return picture, cover


# ---- pictures ----


def jitter(rng: random.Random, rgb: Colour, by: int = 18) -> Colour:
    """A colour near `rgb`."""
    r, g, b = (min(255, max(0, v + rng.randint(-by, by))) for v in rgb)
    return r, g, b


def ground(rng: random.Random, avoid: list[Colour], far: int = 110) -> Colour:
    """A background colour that stands off from everything drawn on it."""
    for _ in range(80):
        grey = rng.randint(0, 255)
        plain = [(255, 255, 255), (128, 128, 128), (grey, grey, grey)]
        rgb = rng.choice(plain) if rng.random() < 0.5 else tuple(rng.randint(0, 255) for _ in range(3))
        if all(sum((a - b) ** 2 for a, b in zip(rgb, other, strict=True)) > far**2 for other in avoid):
            break
    return rgb  # type: ignore[return-value]


def turn(rng: random.Random) -> float:
    """A rotation: upright in a third of the cases."""
    return 0.0 if rng.random() < 0.3 else rng.uniform(0, 2 * math.pi)


def shapes_scene(rng: random.Random, width: int, height: int, count: int | None = None, floor: float = 8) -> Scene:
    """1 to 4 shapes that do not touch; `floor` is the smallest radius in pixels."""
    count = count or rng.choice((1, 1, 2, 2, 3, 3, 4, 4))
    side = min(width, height)
    names = [rng.choice(tuple(COLOURS)) for _ in range(count)]
    kinds = [rng.choice(SHAPES) for _ in range(count)]
    if rng.random() < 0.25:
        names = names[:1] * count
    if rng.random() < 0.25:
        kinds = kinds[:1] * count
    colours = [jitter(rng, COLOURS[name]) for name in names]
    scene = Scene(width, height, ground(rng, colours))
    low = max(floor, 0.08 * side)
    high = max(low + 1, 0.46 * side if count == 1 else min(0.34 * side, 0.32 * math.sqrt(width * height / count)))
    for kind, name, rgb in zip(kinds, names, colours, strict=True):
        for attempt in range(200):
            radius = math.exp(rng.uniform(math.log(low), math.log(high)))
            radius = max(low, radius * (1 - attempt / 250))
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            gap = 2 + 0.01 * side
            if all(math.hypot(x - s.x, y - s.y) > radius + s.radius + gap for s in scene.shapes):
                scene.shapes.append(Shape(kind, name, rgb, x, y, radius, turn(rng)))
                break
    return scene


def make_pair(
    rng: random.Random, first: tuple[int, int], second: tuple[int, int], counts: tuple[int, int]
) -> tuple[Scene, Scene]:
    """Two scenes; single shapes often share a colour or a shape."""
    pair = shapes_scene(rng, *first, counts[0]), shapes_scene(rng, *second, counts[1])
    if counts == (1, 1):
        a, b = pair[0].shapes[0], pair[1].shapes[0]
        if rng.random() < 0.4:
            b.kind = a.kind
        if rng.random() < 0.4:
            b.colour, b.rgb = a.colour, jitter(rng, COLOURS[a.colour])
            pair[1].ground = ground(rng, [b.rgb])
    return pair


def random_text(rng: random.Random, length: int) -> str:
    """Capitals, digits, or both."""
    pool = rng.choices((LETTERS, DIGITS, CHARACTERS), (0.45, 0.25, 0.3))[0]
    return "".join(rng.choice(pool) for _ in range(length))


def text_scene(
    rng: random.Random, width: int, height: int, smallest: float = 24, longest: int = 6, shapes: bool = True
) -> Scene:
    """1 to `longest` printed characters at a font size of at least `smallest` pixels, at times beside a shape."""
    face = rng.choice(fonts())
    length = rng.randint(1, longest)
    text = random_text(rng, length)
    while True:
        wide = font(face, 100).getlength(text) / 100
        largest = min((width - 12) / wide, 0.8 * height, 260)
        if largest >= smallest or len(text) == 1:
            break
        text = text[:-1]
    size = int(math.exp(rng.uniform(math.log(min(smallest, largest)), math.log(largest))))
    size = max(8, size if size < 40 else size // 4 * 4)
    ink = rng.choice(((0, 0, 0), (255, 255, 255))) if rng.random() < 0.5 else jitter(rng, (128, 128, 128), 127)
    scene = Scene(width, height, ground(rng, [ink]), text=text, font=face, size=size, ink=ink)
    box = font(face, size).getbbox(text)
    x = rng.uniform(4, max(4.1, width - 4 - box[2]))
    y = rng.uniform(3, max(3.1, height - 3 - (box[3] - box[1])))
    bottom = y + box[3] - box[1]
    edges = [x + font(face, size).getlength(text[:i]) for i in range(len(text) + 1)]
    scene.glyphs = [(c, edges[i], y, edges[i + 1], bottom) for i, c in enumerate(text)]
    if shapes and rng.random() < 0.35:
        name = rng.choice(tuple(COLOURS))
        rgb = jitter(rng, COLOURS[name])
        side = min(width, height)
        for _ in range(20):
            radius = rng.uniform(max(8, 0.08 * side), 0.3 * side)
            cx, cy = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            clear = (
                cx + radius < x - 6 or cx - radius > edges[-1] + 6 or cy + radius < y - 4 or cy - radius > bottom + 4
            )
            if clear and sum((a - b) ** 2 for a, b in zip(rgb, scene.ground, strict=True)) > 110**2:
                scene.shapes.append(Shape(rng.choice(SHAPES), name, rgb, cx, cy, radius, turn(rng)))
                break
    return scene


def picture_size(rng: random.Random, low: int = 64, high: int = 1024) -> tuple[int, int]:
    """Width and height, spread over the logarithm of the longer side, aspect up to 2:1."""
    long = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    short = max(low, round(long * rng.uniform(0.5, 1)))
    return (long, short) if rng.random() < 0.5 else (short, long)


def noise(rng: random.Random, width: int, height: int) -> Array:
    """Grey or coloured noise of a random grain: float32 [height, width, 3], about unit variance."""
    grain = rng.choice((1, 2, 4, 8, 32))
    source = np.random.default_rng(rng.getrandbits(40))
    shape = (height // grain + 2, width // grain + 2, rng.choice((1, 3)))
    field_ = source.standard_normal(shape, np.float32)
    if grain > 1:
        planes = [
            Image.fromarray(field_[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(shape[2])
        ]
        field_ = np.stack([np.asarray(p) for p in planes], -1)
    return np.broadcast_to(field_[:height, :width], (height, width, 3))


def add_noise(rng: random.Random, picture: Image.Image, cover: Image.Image) -> Image.Image:
    """Put noise behind what is drawn."""
    behind = 1 - np.asarray(cover, np.float32)[..., None] / 255
    pixels = np.asarray(picture) + noise(rng, *picture.size) * behind * rng.uniform(4, 28)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(picture: Image.Image, kind: str, quality: int = 90) -> bytes:
    """The picture as a PNG, JPEG or WEBP file."""
    file = io.BytesIO()
    picture.save(file, kind, **({} if kind == "PNG" else {"quality": quality}))
    return file.getvalue()


def through_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """The picture after a JPEG file."""
    return Image.open(io.BytesIO(encode(picture, "JPEG", quality))).convert("RGB")


# ---- clips ----


def clip(rng: random.Random, width: int, height: int, two: bool | None = None) -> Clip:
    """One or two shapes, each doing one thing from the first frame to the last."""
    count = 2 if (rng.random() < 0.3 if two is None else two) else 1
    names = rng.sample(tuple(COLOURS), 2 * count)
    colours = [jitter(rng, COLOURS[name]) for name in names]
    scene = Scene(width, height, (0, 0, 0))
    actions = [rng.choice(ACTIONS) for _ in range(count)]
    kinds = rng.sample(SHAPES, count)
    ends = []
    across = width >= height
    for i, action in enumerate(actions):
        x0, y0, w, h = 0.0, 0.0, float(width), float(height)
        if count == 2 and across:
            x0, w = i * width / 2, width / 2
        elif count == 2:
            y0, h = i * height / 2, height / 2
        side = min(w, h)
        small = rng.uniform(0.14, 0.27) * side
        large = small
        if action in ("growing", "shrinking"):
            small = rng.uniform(0.12, 0.2) * side
            large = min(small * rng.uniform(1.6, 2.3), 0.48 * side)
        free_x, free_y = w - 2 * large, h - 2 * large
        x, y = rng.uniform(0, free_x), rng.uniform(0, free_y)
        to_x, to_y = x, y
        if action in ("moving left", "moving right"):
            travel = rng.uniform(0.35, 1) * free_x
            x = rng.uniform(0, free_x - travel)
            x, to_x = (x, x + travel) if action == "moving right" else (x + travel, x)
        if action in ("moving up", "moving down"):
            travel = rng.uniform(0.35, 1) * free_y
            y = rng.uniform(0, free_y - travel)
            y, to_y = (y, y + travel) if action == "moving down" else (y + travel, y)
        first, last = (large, small) if action == "shrinking" else (small, large)
        name, rgb = names[2 * i], colours[2 * i]
        to = 2 * i + (action == "changing colour")
        dx, dy = x0 + large, y0 + large
        scene.shapes.append(Shape(kinds[i], name, rgb, x + dx, y + dy, first, turn(rng)))
        ends.append((to_x + dx, to_y + dy, last, colours[to], names[to]))
    shown = [s.rgb for s in scene.shapes] + [end[3] for end in ends]
    scene.ground = ground(rng, shown)
    return Clip(scene, actions, ends, rng.uniform(0.3, 0.7))


def render_frames(rng: random.Random, moment: Clip, times: Array, noisy: bool) -> Array:
    """Frames at `times` in 0..1: uint8 [frames, height, width, 3]; equal times share one drawing."""
    scene = moment.scene
    back = Image.new("RGB", (scene.width, scene.height), scene.ground)
    if noisy:
        back = add_noise(rng, back, Image.new("L", back.size))
    drawn: dict[float, Array] = {}
    for u in times.tolist():
        if u in drawn:
            continue
        frame = back.copy()
        for shape, (x, y, radius, rgb, _), action in zip(scene.shapes, moment.ends, moment.actions, strict=True):
            late = rgb if action == "changing colour" and u > moment.switch else shape.rgb
            now = Shape(shape.kind, "", late, shape.x + (x - shape.x) * u, shape.y + (y - shape.y) * u,
                        shape.radius + (radius - shape.radius) * u, shape.turn)  # fmt: skip
            paste_shape(frame, None, now)
        drawn[u] = np.asarray(frame)
    return np.stack([drawn[u] for u in times.tolist()])


def sample_times(duration: float, frames: int, fps: float, low: int, high: int) -> tuple[Array, float]:
    """The server's frame sampling: (times in 0..1 of the sampled frames, sampled frames per second)."""
    indices, rate = sample_indices(duration, frames, fps, low, high)
    return indices / max(1, frames - 1), rate


def sample_indices(duration: float, frames: int, fps: float, low: int, high: int) -> tuple[Array, float]:
    """Which frames of a file are shown to the model: an even number between `low` and `high`, evenly spaced."""
    count = min(max(round(duration * fps), low), high)
    count = max(2, count - count % 2)
    return np.linspace(0, frames - 1, count).round().astype(int), count / duration


# ---- sounds ----


def tone(rng: random.Random, length: int) -> Sound:
    """A rising, falling or steady tone with a few overtones, somewhere in `length` samples."""
    kind = rng.choice(TONES)
    low = math.exp(rng.uniform(math.log(180), math.log(1400)))
    high = low * rng.uniform(1.3, 2.6)
    first, last = {"rising": (low, high), "falling": (high, low), "steady": (low, low)}[kind]
    samples = np.zeros(length, np.float32)
    part = int(length * rng.uniform(0.55, 1))
    start = rng.randint(0, length - part)
    u = np.arange(part) / part
    pitch = first * (last / first) ** u if rng.random() < 0.5 else first + (last - first) * u
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    wave = np.sin(phase)
    for overtone in range(2, rng.randint(2, 5)):
        wave += rng.uniform(0, 0.5) * np.sin(overtone * phase)
    fade = np.minimum(1, np.minimum(np.arange(part), np.arange(part)[::-1]) / 400)
    samples[start : start + part] = wave * fade * rng.uniform(0.05, 0.35)
    return Sound(samples, tone=kind)


def digits(rng: random.Random, length: int, voices: list[list[Array]]) -> Sound:
    """1 to 6 spoken digits with pauses between them in `length` samples; fewer where they do not fit."""
    sound = Sound(np.zeros(length, np.float32))
    chosen: list[tuple[int, Array]] = []
    stretch, one_voice = rng.uniform(0.94, 1.06), rng.random()
    for _ in range(rng.randint(1, max(1, min(6, int(length / RATE / 0.55))))):
        digit = rng.randint(0, 9)
        choices = voices[digit]
        at = one_voice + rng.uniform(-0.02, 0.02) if one_voice < 0.7 else rng.random()
        spoken = choices[int(min(max(at, 0), 0.999) * len(choices))].astype(np.float32) / 32768
        size = int(len(spoken) * stretch)
        spoken = np.interp(np.linspace(0, len(spoken) - 1, size), np.arange(len(spoken)), spoken)
        if sum(len(s) for _, s in chosen) + size + 800 > length and chosen:
            break
        chosen.append((digit, spoken[:length].astype(np.float32) * rng.uniform(0.4, 1)))
    free = length - sum(len(s) for _, s in chosen)
    gaps = np.array([rng.random() + 0.05 for _ in range(len(chosen) + 1)])
    gaps *= free * rng.uniform(0.3, 1) / gaps.sum()
    at = 0
    for (digit, spoken), gap in zip(chosen, gaps, strict=False):
        at += int(gap)
        sound.samples[at : at + len(spoken)] = spoken
        sound.spans.append((digit, at, at + len(spoken)))
        at += len(spoken)
    sound.digits = "".join(str(d) for d, _, _ in sound.spans)
    return sound


def roughen(rng: random.Random, samples: Array) -> Array:
    """What microphones, telephones and codecs do: a low-pass, noise and gain."""
    if rng.random() < 0.4:
        spectrum = np.fft.rfft(samples)
        spectrum[int(len(spectrum) * rng.uniform(0.42, 1)) :] = 0
        samples = np.fft.irfft(spectrum, len(samples)).astype(np.float32)
    if rng.random() < 0.6:
        source = np.random.default_rng(rng.getrandbits(40))
        level = 10 ** rng.uniform(-4, -1.9)
        samples = samples + source.standard_normal(len(samples), np.float32) * level
    return np.clip(samples * rng.uniform(0.5, 1), -1, 1).astype(np.float32)
