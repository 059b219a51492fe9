"""Spoken digits by espeak-ng, made once and cached in one .npz file outside the repository.

    python -m triptych.python_models.builtin.training.speech

The file holds 16 kHz int16 clips of single digits for two sets of voices that share no voice: ``train`` and ``test``.
"""

import argparse
import functools
import io
import os
import random
import shutil
import subprocess
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ASSETS = Path(os.environ.get("TRIPTYCH_TRAIN_ASSETS", Path.home() / ".cache" / "triptych" / "training"))
RATE = 16000
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAIN_VOICES = [f"en-us+{v}" for v in ["m1", "m2", "m3", "m4", "m5", "m7", "m8", "f1", "f2", "f3", "f4", "f5"]]
TRAIN_VOICES += [f"en-gb+{v}" for v in ["m1", "m3", "m5", "m7", "f1", "f3", "f4"]]
TRAIN_VOICES += ["en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan"]
TEST_VOICES = ["en-us+m6", "en-gb+f2", "en-gb-x-rp+m4"]
HOW = "Make the speech clips first: install espeak-ng and run `python -m {module} {path}`."


def speak(word: str, voice: str, speed: int, pitch: int) -> Array:
    """One spoken word, silence trimmed: int16 [samples] at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    with wave.open(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)) as source:
        rate = source.getframerate()
        sound = np.frombuffer(source.readframes(1 << 24), np.int16).astype(np.float32)
    length = int(len(sound) * RATE / rate)
    spectrum = np.fft.rfft(sound)[: length // 2 + 1]
    sound = np.fft.irfft(spectrum, length) * length / len(sound)
    loud = np.flatnonzero(np.abs(sound) > 200)
    if not len(loud):
        return np.zeros(0, np.int16)
    sound = sound[max(0, loud[0] - 80) : loud[-1] + 160]
    return np.clip(sound, -32767, 32767).astype(np.int16)


def clips(voices: list[str], variants: int, seed: int) -> tuple[Array, Array, Array]:
    """Every digit by every voice: (samples [total], offsets [clips + 1], digits [clips])."""
    rng = random.Random(seed)
    jobs = [
        (word, voice, rng.randint(120, 235), rng.randint(20, 80))
        for word in WORDS
        for voice in voices
        for _ in range(variants)
    ]
    with ThreadPoolExecutor(2) as pool:
        sounds = list(pool.map(lambda job: speak(*job), jobs))
    keep = [i for i, sound in enumerate(sounds) if len(sound) > RATE // 10]
    offsets = np.cumsum([0] + [len(sounds[i]) for i in keep])
    return np.concatenate([sounds[i] for i in keep]), offsets, np.array([WORDS.index(jobs[i][0]) for i in keep])


@functools.cache
def load(path: str, part: str) -> list[list[Array]]:
    """Clips of one part, 'train' or 'test', by digit: ten lists of int16 [samples]."""
    if not os.path.exists(path):
        raise SystemExit(f"{path} does not exist. " + HOW.format(module=__spec__.name, path=path))
    with np.load(path) as data:
        sounds, offsets, digits = data[part], data[part + "_offsets"], data[part + "_digits"]
    return [[sounds[offsets[i] : offsets[i + 1]] for i in np.flatnonzero(digits == d)] for d in range(10)]


def main() -> None:
    """Write the .npz file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", default=ASSETS / "speech.npz")
    parser.add_argument("--variants", type=int, default=6, help="clips of each digit and voice")
    options = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is not installed (Debian: apt-get install espeak-ng).")
    arrays = {}
    for part, voices, seed in (("train", TRAIN_VOICES, 1), ("test", TEST_VOICES, 2)):
        arrays[part], arrays[part + "_offsets"], arrays[part + "_digits"] = clips(voices, options.variants, seed)
    options.path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.path, **arrays)
    print(f"{options.path}: {len(arrays['train_digits'])} + {len(arrays['test_digits'])} clips")


if __name__ == "__main__":
    main()
