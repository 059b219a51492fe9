"""The vision encoder alone: pictures a second through tower and projector, and where the time goes.

    python benchmarks/shapes.py qwen2.5-vl-7b /tmp/shape
    python benchmarks/encoder.py /tmp/shape --device cuda --picture 1024 --batches 1 4 --profile

The model's FLOPs are those of its matrix products, with a multiplication and an addition counted as two.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from support import median, record

from triptych.python_models.contract.request import MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.checkpoint import find_checkpoint
from triptych.python_models.families.loading import stage_dtype
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Image, Medium

ROUNDS = 12


def timed(run: Any, device: str) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(ROUNDS):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[2:])


def products(tower: torch.nn.Module, run: Any) -> float:
    """FLOPs of the matrix products of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=int, default=1024, help="edge in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--profile", action="store_true", help="show the kernels of the largest batch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = Settings(model=args.model, device=args.device, load_format="dummy")
    family = load_family(settings)
    device = "cuda:0" if args.device == "cuda" else args.device
    dtype = stage_dtype(find_checkpoint(settings), settings, device)
    figures: dict[str, Any] = {}
    preprocessor = family.load_preprocessor()
    encoder: Any = family.load_encoder("vision", device, dtype)

    def item(seed: int) -> Any:
        pixels = np.random.default_rng(seed).integers(0, 256, (args.picture, args.picture, 3), dtype=np.uint8)
        medium = Medium("image", Image(PILImage.fromarray(pixels)), str(seed), "messages[0]")
        message = Message("user", (MediaPart("image", blob=0), TextPart("what is this?")), plain=False)
        return preprocessor.prepare((message,), (medium,))

    figures["prepare, ms"] = round(1000 * timed(lambda: item(0), "cpu"), 2)
    print(figures, flush=True)
    for batch in args.batches:
        items = [item(seed).features["vision"][0] for seed in range(batch)]
        seconds = timed(lambda items=items: encoder.encode(items), device)
        flops = products(encoder.base, lambda items=items: encoder.encode(items))
        name = f"{batch} x {args.picture}"
        figures[name] = {
            "rows": sum(i.num_rows for i in items),
            "ms": round(1000 * seconds, 2),
            "pictures/s": round(batch / seconds, 2),
            "TFLOP/s": round(flops / seconds / 1e12, 1),
        }
        print(name, figures[name], flush=True)
    if args.profile:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            encoder.encode(items)
            torch.cuda.synchronize()
        print(prof.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70))
    if args.out:
        record(args.out, "encoder", sys.argv, figures)


if __name__ == "__main__":
    main()
