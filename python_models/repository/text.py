"""Specs of the contract -> text of config.pbtxt files.

Only fields that every release from 24.10 on knows are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from ..contract.settings import Settings
from ..contract.tensors import EMBEDDING, EnsembleSpec, StageSpec, TensorSpec

EMBEDDING_DTYPES = ("FP32", "BF16", "FP16")
_HEAD = "# Written by triptych.python_models.repository from the contract; do not edit.\n"


def stage_config(
    spec: StageSpec,
    settings: Settings,
    *,
    embedding_dtype: str,
    gpu_ids: Sequence[int],
    stage_class: str | None = None,
) -> str:
    """config.pbtxt of a stage.

    Args:
        spec: the stage.
        settings: options of the deployment, carried whole in the parameter ``settings``.
        embedding_dtype: what stands for EMBEDDING.
        gpu_ids: GPUs of a stage that uses one; none: CPU. Encoders run on each of them, the language model's rank 0
            on the first.
        stage_class: "/path/file.py:Class" that replaces the built-in class.
    """
    on_gpu = spec.uses_gpu and bool(gpu_ids) and not settings.pool_of(spec.name)
    parameters = {"stage": stage_class or spec.name, "settings": settings.to_json()}
    if any(tensor.device_ok for tensor in spec.inputs) and on_gpu and settings.mm_feature_transport != "cpu":
        # without it Triton copies what another model left on the GPU to the host first
        parameters["FORCE_CPU_ONLY_INPUT_TENSORS"] = "no"
    count = settings.preprocess_instances if spec.name == "preprocess" else 1
    group = [f"count: {count}", "kind: KIND_GPU" if on_gpu else "kind: KIND_CPU"]
    if on_gpu:
        # one process for each GPU of an encoder; the language model starts its own further ranks
        used = gpu_ids[:1] if spec.name == "language_model" else gpu_ids
        group.append(f"gpus: [ {', '.join(map(str, used))} ]")
    parts = [
        _HEAD,
        f"# {spec.help}\n" if spec.help else "",
        f"name: {_quote(spec.name)}\n",
        'backend: "triptych"\n',
        'runtime: "model.py"\n',
        "max_batch_size: 0\n",
        *_tensors("input", spec.inputs, embedding_dtype, optional=True),
        *_tensors("output", spec.outputs, embedding_dtype, optional=False),
        _block("instance_group [", [_block("{", group, "}", 1)], "]"),
        "model_transaction_policy { decoupled: true }\n" if spec.decoupled else "",
        *(
            f"parameters {{ key: {_quote(key)} value {{ string_value: {_quote(value)} }} }}\n"
            for key, value in parameters.items()
        ),
    ]
    return "".join(parts)


def ensemble_config(spec: EnsembleSpec, *, embedding_dtype: str) -> str:
    """config.pbtxt of an ensemble."""
    steps = [
        _block(
            "{",
            [
                f"model_name: {_quote(step.stage)}",
                "model_version: -1",
                *_map("input_map", step.inputs),
                *_map("output_map", step.outputs),
            ],
            "}" + ("," if step is not spec.steps[-1] else ""),
            2,
        )
        for step in spec.steps
    ]
    parts = [
        _HEAD,
        f"# {spec.help}\n" if spec.help else "",
        f"name: {_quote(spec.name)}\n",
        'platform: "ensemble"\n',
        "max_batch_size: 0\n",
        *_tensors("input", spec.inputs, embedding_dtype, optional=True),
        *_tensors("output", spec.outputs, embedding_dtype, optional=False),
        _block("ensemble_scheduling {", [_block("step [", steps, "]", 1)], "}"),
    ]
    return "".join(parts)


def wire_dtype(spec: TensorSpec, embedding_dtype: str) -> str:
    """The config.pbtxt name of a tensor's dtype."""
    return f"TYPE_{embedding_dtype}" if spec.dtype == EMBEDDING else spec.dtype


def _tensors(kind: str, specs: Sequence[TensorSpec], embedding_dtype: str, *, optional: bool) -> Iterable[str]:
    for spec in specs:
        lines = [
            f"name: {_quote(spec.name)}",
            f"data_type: {wire_dtype(spec, embedding_dtype)}",
            f"dims: [ {', '.join(map(str, spec.dims))} ]",
        ]
        if optional and spec.optional:
            lines.append("optional: true")
        yield _block(f"{kind} [", [_block("{", lines, "}", 1)], "]")


def _map(field: str, names: Mapping[str, str]) -> Iterable[str]:
    for inner, outer in names.items():
        yield f"{field} {{ key: {_quote(inner)} value: {_quote(outer)} }}"


def _block(opening: str, lines: Iterable[str], closing: str, depth: int = 0) -> str:
    """Lines between brackets; ``depth`` counts the blocks around it, whose indentation is added here."""
    pad = "  " * depth
    body = "".join(line if line.endswith("\n") else f"{pad}  {line}\n" for line in lines)
    return f"{pad}{opening}\n{body}{pad}{closing}\n"


def _quote(text: str) -> str:
    """A protobuf text string literal (ASCII, so that any locale reads it)."""
    # JSON escapes are protobuf escapes, but protobuf's \u stops at the basic plane: write the UTF-8 bytes instead
    plain = json.dumps(text, ensure_ascii=False)
    return "".join(c if " " <= c <= "~" else "".join(f"\\{b:03o}" for b in c.encode()) for c in plain)
