"""Writes docs/metrics.md: every metric, from the code that declares it.

python docs/metrics_table.py            write docs/metrics.md
python docs/metrics_table.py --check    fail where it is not current
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import Histogram
from prometheus_client.metrics import MetricWrapperBase

from triptych.client.openai_api.metrics import ShimMetrics
from triptych.python_models.contract.metrics import METRICS
from triptych.python_models.contract.tensors import STAGES

PAGE = Path(__file__).parent / "metrics.md"
_HEAD = """# Metrics

`GET /metrics` of the endpoint gives all of them, its own, those of the stages and the Triton server's, in Prometheus'
text format: one scrape is enough. The Triton server gives its own and those of the stages on its metrics port too
(`--metrics-port`). `--no-enable-metrics` turns both off. [observability.md](observability.md) says what to do with
them.

A histogram `x` has the samples `x_bucket`, `x_sum` and `x_count`. Written by `make metrics`.
"""
_STAGES = """
## Of the stages

Every sample has the label `stage`, and `instance` where a stage has several processes (which Prometheus calls
`exported_instance`, because it has an `instance` of its own). A sample is there once there was something to count.
"""
_TRITON = """
## Of the Triton server

Its own names begin with `nv_`; its documentation lists them. Most telling for each model:
`nv_inference_request_success`, `nv_inference_request_failure`; on GPUs `nv_gpu_utilization` and
`nv_gpu_memory_used_bytes`. Stages take each request at once and batch by themselves, so what the server calls queue and
batch says little here: look at `triptych_queue_seconds` and `triptych_batch_size`.
"""


def write() -> str:
    """The page."""
    lines = [_HEAD, "## Of the endpoint\n", "| metric | kind | labels | what |", "|---|---|---|---|"]
    bounds: dict[tuple[float, ...], list[str]] = {}
    for own in _own():
        name, kind = own._name, own._type
        if isinstance(own, Histogram):
            bounds.setdefault(tuple(own._upper_bounds[:-1]), []).append(name)
        shown = f"{name}_total" if kind == "counter" else name
        lines.append(f"| `{shown}` | {kind} | {_labels(own._labelnames)} | {own._documentation} |")
    lines += [_STAGES, "| metric | kind | labels | stages | what |", "|---|---|---|---|---|"]
    for spec in METRICS.values():
        if spec.buckets:
            bounds.setdefault(tuple(spec.buckets), []).append(spec.name)
        stages = "all" if set(spec.stages) == set(STAGES) else ", ".join(spec.stages)
        lines.append(f"| `{spec.name}` | {spec.kind} | {_labels(spec.labels)} | {stages} | {spec.help} |")
    lines += [_TRITON, "## Bounds of histograms\n"]
    for values, names in bounds.items():
        lines.append(f"- {', '.join(f'`{name}`' for name in names)}: {', '.join(f'{value:g}' for value in values)}")
    return "\n".join(lines) + "\n"


def _own() -> list[MetricWrapperBase]:
    """The endpoint's, in the order in which they are declared."""
    return [value for value in vars(ShimMetrics()).values() if isinstance(value, MetricWrapperBase)]


def _labels(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write docs/metrics.md.")
    parser.add_argument("--check", action="store_true", help="fail where it is not current")
    text = write()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        raise SystemExit("docs/metrics.md is not current: run make metrics")


if __name__ == "__main__":
    main()
