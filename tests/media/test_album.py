"""All pictures of a request are fetched at once."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image as PILImage

from triptych.python_models.contract.plan import Plan

PICTURES = 10


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    PILImage.fromarray(coarse).resize((1280, 720)).save(out, "JPEG")
    return out.getvalue()


def test_fetched_at_once(make: Callable[..., Any], web: Any) -> None:
    running = make(mm_max_concurrent_calls=1)
    all_here = threading.Barrier(PICTURES, timeout=30)
    addresses = []
    for k in range(PICTURES):
        addresses.append(web.serve(f"/{k}.jpg", jpeg(k)))

        def after_all(handler: Any, answer: Callable[..., None] = web.routes[f"/{k}.jpg"]) -> None:
            all_here.wait()  # answers nobody before the tenth has asked
            answer(handler)

        web.routes[f"/{k}.jpg"] = after_all
    out = running.start([{"type": "image", "url": address} for address in addresses]).ok
    assert len({item.digest for item in Plan.from_json(out["plan"][0]).items}) == PICTURES
    assert web.most_open == PICTURES
