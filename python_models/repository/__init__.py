"""Writes a Triton model repository (config.pbtxt files) from the contract."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..contract.errors import invalid
from ..contract.settings import Settings
from ..contract.tensors import ENSEMBLES, STAGES
from .text import EMBEDDING_DTYPES, ensemble_config, stage_config, wire_dtype

__all__ = ["EMBEDDING_DTYPES", "ensemble_config", "stage_config", "wire_dtype", "write"]


def write(
    folder: Path,
    settings: Settings,
    *,
    embedding_dtype: str = "FP32",
    gpu_ids: Sequence[int] = (),
    stage_classes: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Write ``<folder>/<model>/config.pbtxt`` and an empty version folder for every stage and ensemble.

    Equal arguments give equal files. A model folder that exists is replaced; other content of ``folder`` stays.

    Args:
        folder: made if it does not exist.
        settings: options of the deployment.
        embedding_dtype: "FP32", "BF16" or "FP16".
        gpu_ids: GPUs of the stages that use one, in the order of ranks; none: everything on the CPU.
        stage_classes: {stage: "/path/file.py:Class"} that replaces the built-in class of a stage.

    Returns:
        the model names, stages before ensembles.

    Raises:
        TriptychError: INVALID_REQUEST for an unknown dtype or stage name.
    """
    if embedding_dtype not in EMBEDDING_DTYPES:
        raise invalid(f"embedding dtype must be one of {', '.join(EMBEDDING_DTYPES)}, got {embedding_dtype!r}")
    if settings.gpu_preprocessing == "auto":
        settings = replace(settings, gpu_preprocessing="on" if gpu_ids else "off")
    classes = dict(stage_classes or {})
    if unknown := sorted(set(classes) - set(STAGES)):
        raise invalid(f"unknown stage {unknown[0]!r}; there are: {', '.join(STAGES)}", "stage_classes")
    configs = {
        name: stage_config(
            spec, settings, embedding_dtype=embedding_dtype, gpu_ids=gpu_ids, stage_class=classes.get(name)
        )
        for name, spec in STAGES.items()
    }
    configs |= {name: ensemble_config(spec, embedding_dtype=embedding_dtype) for name, spec in ENSEMBLES.items()}
    for name, text in configs.items():
        model = folder / name
        shutil.rmtree(model, ignore_errors=True)
        # Triton wants a version folder even where it stays empty; git wants a file in it
        (model / "1").mkdir(parents=True)
        (model / "1" / ".gitkeep").touch()
        (model / "config.pbtxt").write_text(text, encoding="ascii")
    return tuple(configs)
