"""Seconds from ``triptych serve`` to ready, several times.

python benchmarks/startup.py [--model builtin] [--runs 5]
"""

from __future__ import annotations

import argparse
import sys

from support import median, save, server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="startup_cpu")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    seconds = []
    for _ in range(args.runs):
        with server(args.model, "--device", args.device) as (_, _, ready):
            seconds.append(round(ready, 2))
    save(args.name, sys.argv, {"ready_s": seconds, "ready_s_median": median(seconds)})


if __name__ == "__main__":
    main()
