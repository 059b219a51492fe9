"""A request with ten pictures takes little longer than the slowest of them to come."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image as PILImage

from triptych.python_models.contract.plan import Plan

SLOW_S, FAST_S = 1.5, 0.05


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    PILImage.fromarray(coarse).resize((1280, 720)).save(out, "JPEG")
    return out.getvalue()


def test_fetched_and_decoded_at_once(make: Callable[..., Any], web: Any) -> None:
    running = make(mm_max_concurrent_calls=1)
    addresses = []
    for k in range(10):
        addresses.append(web.serve(f"/{k}.jpg", jpeg(k)))
        answer = web.routes[f"/{k}.jpg"]

        def late(handler: Any, answer: Any = answer, wait: float = SLOW_S if k == 3 else FAST_S) -> None:
            time.sleep(wait)
            answer(handler)

        web.routes[f"/{k}.jpg"] = late
    start = time.monotonic()
    out = running.start([{"type": "image", "url": address} for address in addresses]).ok
    took = time.monotonic() - start
    assert len({item.digest for item in Plan.from_json(out["plan"][0]).items}) == 10
    assert web.most_open == 10
    assert SLOW_S <= took < 1.3 * SLOW_S
