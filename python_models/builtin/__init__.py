"""The built-in demo model: a small omni checkpoint that is part of the package."""

from pathlib import Path


def checkpoint() -> Path:
    """The Hugging Face folder of the built-in checkpoint."""
    return Path(__file__).resolve().parent / "checkpoint"
