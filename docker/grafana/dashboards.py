"""Writes the dashboards in docker/grafana/dashboards; ``make dashboards`` runs it, a test compares.

A panel is a title, a unit and queries; everything else is the same for all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
_SOURCE = {"type": "prometheus", "uid": "prometheus"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


@dataclass(frozen=True)
class Panel:
    """A picture over time.

    Attributes:
        title: what it shows.
        unit: Grafana's name of it.
        queries: (PromQL, legend); ``$i`` stands for the filter by instance, ``$r`` for the window of rates.
        help: what to make of it.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    help: str = ""


def rate(metric: str, by: str = "", more: str = "") -> str:
    """Sum of the rates of a counter."""
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate({metric}{{$i{more}}}[$r]))"


def quantiles(metric: str, *shares: float, by: str = "") -> tuple[tuple[str, str], ...]:
    """Quantiles of a histogram, each with its legend; ``by`` further labels."""
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        (f"histogram_quantile({share:g}, {rate(f'{metric}_bucket', labels)})", f"p{100 * share:g}{legend}")
        for share in shares or (0.5, 0.95, 0.99)
    )


def mean(metric: str, by: str = "") -> str:
    """Mean of what a histogram observed."""
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def gauge(metric: str, by: str = "stage", how: str = "sum") -> str:
    """A gauge, over the processes of a stage."""
    return f"{how} by ({by}) ({metric}{{$i}})"


OVERVIEW: dict[str, Sequence[Panel]] = {
    "Requests": (
        Panel("Requests by status", "reqps", ((rate("triptych_http_requests_total", "code"), "{{code}}"),)),
        Panel("Requests by route", "reqps", ((rate("triptych_http_requests_total", "route"), "{{route}}"),)),
        Panel(
            "Errors by kind",
            "reqps",
            ((rate("triptych_http_errors_total", "kind"), "{{kind}}"),),
            "overloaded: the server refuses more work; stage_failed, stage_dead, timeout: see the log",
        ),
    ),
    "Latency": (
        Panel("Time to first token", "s", quantiles("triptych_http_time_to_first_token_seconds")),
        Panel("Time between tokens", "s", quantiles("triptych_inter_token_seconds")),
        Panel("Whole requests", "s", quantiles("triptych_http_request_seconds")),
    ),
    "Tokens": (
        Panel(
            "Tokens per second",
            "short",
            (
                (rate("triptych_generation_tokens_total"), "generated"),
                (rate("triptych_prompt_tokens_total", "kind"), "prompt, {{kind}}"),
            ),
        ),
        Panel(
            "Caches that hit",
            "percentunit",
            (
                (f"{rate('triptych_cached_tokens_total')} / {rate('triptych_prompt_tokens_total')}", "prompt tokens"),
                (
                    f"{rate('triptych_encoder_cache_hits_total', 'stage')} / "
                    f"({rate('triptych_encoder_cache_hits_total', 'stage')} + "
                    f"{rate('triptych_encoder_cache_misses_total', 'stage')})",
                    "media, {{stage}}",
                ),
            ),
        ),
        Panel("Ends of answers", "reqps", ((rate("triptych_answers_total", "finish_reason"), "{{finish_reason}}"),)),
    ),
    "Saturation": (
        Panel(
            "Requests in the engine",
            "short",
            (
                ('sum (triptych_requests_running{$i, stage="language_model"})', "running"),
                ('sum (triptych_requests_waiting{$i, stage="language_model"})', "waiting"),
            ),
        ),
        Panel(
            "KV cache",
            "percentunit",
            (
                (gauge("triptych_kv_cache_usage_ratio", how="max"), "in use"),
                (gauge("triptych_prefix_cache_usage_ratio", how="max"), "kept for prompts to come"),
            ),
        ),
        Panel(
            "Stages up",
            "short",
            (
                (gauge("triptych_stage_up", how="min"), "{{stage}}"),
                (rate("triptych_stage_restarts_total", "stage"), "restarts/s, {{stage}}"),
            ),
        ),
    ),
}

STAGES: dict[str, Sequence[Panel]] = {
    "Where the time goes": (
        Panel(
            "Mean of each part",
            "s",
            (
                (mean("triptych_media_fetch_seconds"), "fetch, one medium"),
                (mean("triptych_media_decode_seconds"), "decode, one medium"),
                (mean("triptych_process_seconds"), "template and processor"),
                (mean("triptych_encode_seconds"), "encode, one batch"),
                (mean("triptych_queue_seconds", "stage"), "queue, {{stage}}"),
                (mean("triptych_prefill_seconds"), "prefill"),
            ),
        ),
        Panel("Time in a stage, p95", "s", quantiles("triptych_stage_seconds", 0.95, by="stage")),
        Panel("Waiting inside a stage, p95", "s", quantiles("triptych_queue_seconds", 0.95, by="stage")),
    ),
    "Requests": (
        Panel("Running", "short", ((gauge("triptych_requests_running"), "{{stage}}"),)),
        Panel("Waiting", "short", ((gauge("triptych_requests_waiting"), "{{stage}}"),)),
        Panel(
            "Ended, by outcome",
            "reqps",
            ((rate("triptych_requests_total", "stage, outcome"), "{{stage}} {{outcome}}"),),
        ),
    ),
    "Media": (
        Panel("Media", "reqps", ((rate("triptych_media_items_total", "modality"), "{{modality}}"),)),
        Panel("Bytes of files", "Bps", ((rate("triptych_media_bytes_total", "modality"), "{{modality}}"),)),
        Panel(
            "Fetch and decode, p95",
            "s",
            tuple(
                (query, f"{name} {legend}")
                for name in ("fetch", "decode")
                for query, legend in quantiles(f"triptych_media_{name}_seconds", 0.95, by="modality")
            ),
        ),
    ),
    "Encoders": (
        Panel("Encoding one batch", "s", quantiles("triptych_encode_seconds", 0.5, 0.95, by="stage")),
        Panel("Mean requests in a batch", "short", ((mean("triptych_batch_size", "stage"), "{{stage}}"),)),
        Panel(
            "Cache",
            "bytes",
            (
                (gauge("triptych_encoder_cache_bytes"), "{{stage}}"),
                (gauge("triptych_encoder_cache_limit_bytes"), "limit, {{stage}}"),
            ),
        ),
    ),
    "Language model": (
        Panel("A step of the engine", "s", quantiles("triptych_engine_step_seconds")),
        Panel(
            "Mean tokens of a step",
            "short",
            (
                (mean("triptych_batch_tokens", "stage"), "{{stage}}"),
                (rate("triptych_preemptions_total"), "preempted/s"),
            ),
        ),
        Panel(
            "Lengths, p95",
            "short",
            (
                *((query, "prompt") for query, _ in quantiles("triptych_request_prompt_tokens", 0.95)),
                *((query, "answer") for query, _ in quantiles("triptych_request_generation_tokens", 0.95)),
            ),
        ),
    ),
    "Processes": (
        Panel(
            "Seconds since the last sign of life",
            "s",
            (("time() - max by (stage) (triptych_heartbeat_timestamp_seconds{$i})", "{{stage}}"),),
        ),
        Panel("GPU memory held", "bytes", ((gauge("triptych_gpu_memory_bytes"), "{{stage}}"),)),
        Panel(
            "The endpoint",
            "short",
            (
                ("sum (triptych_http_requests_running{$i})", "requests in flight"),
                (rate("triptych_http_cancelled_total"), "clients that went away/s"),
            ),
        ),
    ),
}

DASHBOARDS = {"overview": ("Triptych", OVERVIEW), "stages": ("Triptych: stages", STAGES)}


def dashboard(name: str) -> dict[str, Any]:
    """What Grafana loads."""
    title, rows = DASHBOARDS[name]
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in rows.items():
        panels.append({"type": "row", "title": row, "collapsed": False, "panels": [], "gridPos": _place(0, y, 24, 1)})
        y += 1
        for number, panel in enumerate(members):
            place = _place(number % _COLUMNS * _WIDTH, y + number // _COLUMNS * _HEIGHT, _WIDTH, _HEIGHT)
            panels.append(_panel(panel, place))
        y += -(-len(members) // _COLUMNS) * _HEIGHT
    for number, made in enumerate(panels, 1):
        made["id"] = number
    query = "label_values(triptych_stage_up, instance)"
    variable = {
        "name": "instance",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": "instances"},
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }
    return {
        "uid": f"triptych-{name}",
        "title": title,
        "tags": ["triptych"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [variable]},
        "links": [{"type": "dashboards", "tags": ["triptych"], "title": "Triptych", "asDropdown": False}],
        "panels": panels,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": _SOURCE,
            "expr": query.replace("$i", 'instance=~"$instance"').replace("$r", "$__rate_interval"),
            "legendFormat": legend,
        }
        for number, (query, legend) in enumerate(panel.queries)
    ]
    defaults = {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name in DASHBOARDS:
        (output / f"{name}.json").write_text(json.dumps(dashboard(name), indent=2) + "\n")


if __name__ == "__main__":
    main()
