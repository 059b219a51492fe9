"""Make the small pictures, clip and sounds of `examples/media` that the built-in model understands.

python -m triptych.python_models.builtin.training.examples examples/media
"""

import argparse
import random
from pathlib import Path

import numpy as np

from . import data, evaluate, speech
from .data import COLOURS, Clip, Scene, Shape


def shape(colour: str, kind: str, x: float, y: float, radius: float, turn: float = 0.0) -> Shape:
    """A shape in the plain colour of that name."""
    return Shape(kind, colour, COLOURS[colour], x, y, radius, turn)


def text_scene(text: str, width: int, height: int, size: int) -> Scene:
    """Dark text in the middle of a light picture."""
    face = next(path for path in data.fonts() if path.endswith("DejaVuSans-Bold.ttf"))
    left, top, right, bottom = data.font(face, size).getbbox(text)
    x, y = (width - right) / 2, (height - (bottom - top)) / 2
    glyphs = [(text, x, y, x + right - left, y + bottom - top)]
    return Scene(width, height, (235, 235, 225), text=text, font=face, size=size, ink=(30, 40, 90), glyphs=glyphs)


def pictures() -> dict[str, Scene]:
    """The scenes of the pictures, by file name."""
    three = [shape("red", "circle", 110, 100, 62), shape("blue", "star", 360, 110, 75, 0.3)]
    three.append(shape("yellow", "triangle", 240, 275, 66))
    return {
        "picture.png": Scene(480, 360, (225, 225, 230), three),
        "two_a.jpg": Scene(320, 240, (240, 240, 240), [shape("green", "square", 160, 120, 70, 0.2)]),
        "two_b.jpg": Scene(320, 240, (240, 240, 240), [shape("green", "cross", 160, 120, 75)]),
        "text.png": text_scene("HELLO", 400, 160, 72),
    }


def clip() -> Clip:
    """A purple diamond that moves right."""
    start = shape("purple", "diamond", 60, 130, 44)
    scene = Scene(320, 240, (240, 235, 220), [start])
    return Clip(scene, ["moving right"], [(260.0, 130.0, 44.0, start.rgb, "purple")], 0.5)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--speech", type=Path, default=speech.ASSETS / "speech.npz")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, scene in pictures().items():
        picture, _ = data.render(scene)
        (options.folder / name).write_bytes(data.encode(picture, "PNG" if name.endswith("png") else "JPEG"))
    frames = data.render_frames(random.Random(0), clip(), np.linspace(0, 1, 72), noisy=False)
    (options.folder / "clip.mp4").write_bytes(evaluate.encode_clip(frames, 24, 23))
    voices = speech.load(str(options.speech), "test")
    pause = np.zeros(speech.RATE // 5, np.int16)
    parts = [pause] + [part for digit in (4, 7, 1, 9) for part in (voices[digit][2], pause)]
    samples = np.concatenate(parts).astype(np.float32) / 32768
    (options.folder / "digits.wav").write_bytes(evaluate.encode_sound(samples, 16000, "wav"))
    u = np.arange(2 * speech.RATE) / (2 * speech.RATE)
    phase = 2 * np.pi * np.cumsum(300 * 2.5**u) / speech.RATE
    tone = 0.25 * np.sin(phase) * np.minimum(1, 40 * np.minimum(u, 1 - u))
    (options.folder / "tone.mp3").write_bytes(evaluate.encode_sound(tone.astype(np.float32), 22050, "mp3"))


if __name__ == "__main__":
    main()
