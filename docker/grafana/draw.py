"""Draws a dashboard from a running Prometheus, for the documentation: the same panels and queries, without Grafana.

    python docker/grafana/draw.py overview docs/images/dashboard-overview.png --minutes 5

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

_COLUMNS = 3
_UNITS = {"s": "seconds", "reqps": "1/s", "percentunit": "share", "bytes": "bytes", "Bps": "bytes/s", "short": ""}


def series(prometheus: str, query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
    """What Prometheus answers to a range query."""
    arguments = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": step})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{arguments}", timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def legend(text: str, labels: dict[str, str]) -> str:
    """A legend with its labels filled in."""
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("dashboard")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--rate", default="30s", help="window of rates")
    arguments = parser.parse_args()
    rows = _dashboards().DASHBOARDS[arguments.dashboard][1]
    panels = [(row, panel) for row, members in rows.items() for panel in members]
    end = time.time()
    start = end - 60 * arguments.minutes
    height = -(-len(panels) // _COLUMNS)
    figure, axes = plt.subplots(height, _COLUMNS, figsize=(15, 2.7 * height), dpi=72, layout="constrained")
    for axis, (row, panel) in zip(axes.flat, panels, strict=False):
        for query, shown in panel.queries:
            text = query.replace("$i", 'instance=~".*"').replace("$r", arguments.rate)
            for one in series(arguments.prometheus, text, start, end, max(1.0, (end - start) / 150)):
                points = [(float(moment) - end, float(value)) for moment, value in one["values"]]
                axis.plot(*zip(*points, strict=True), linewidth=1.2, label=legend(shown, one["metric"]))
        axis.set_title(f"{row}: {panel.title}", fontsize=9)
        axis.set_ylabel(_UNITS[panel.unit], fontsize=7)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6, loc="upper left")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.supxlabel("seconds before the picture was drawn", fontsize=8)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture)
    with Image.open(arguments.picture) as drawn:
        # a third of the size
        small = drawn.convert("RGB").quantize(64)
    small.save(arguments.picture, optimize=True)


def _dashboards() -> Any:
    spec = importlib.util.spec_from_file_location("dashboards", Path(__file__).parent / "dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["dashboards"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
