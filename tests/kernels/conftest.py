"""What the kernels' tests share: where kernels run, memory full of NaN, tolerances, a compiler for the H200.

Kernels run in Triton's interpreter on a machine without GPU (tests/conftest.py turns it on) and for real on one with.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from triptych.python_models.families import torchvision_fix

# tests compare with transformers' modules
torchvision_fix.install()

# largest error over the root mean square of the expected values; never loosened elsewhere
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _aot() -> ModuleType:
    """tests/kernels/aot.py; tests are no package."""
    if "triptych_tests_aot" not in sys.modules:
        spec = importlib.util.spec_from_file_location("triptych_tests_aot", Path(__file__).parent / "aot.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["triptych_tests_aot"] = module
        spec.loader.exec_module(module)
    return sys.modules["triptych_tests_aot"]


@pytest.fixture(scope="session")
def compile_sm90() -> Callable[..., Any]:
    """``compile_sm90(kernel, signature, constexprs, **options)`` of aot.py."""
    compile_: Callable[..., Any] = _aot().compile_sm90
    return compile_


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: "cuda", or "cpu" in the interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet holds NaN (integers: a number far out of range)."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """``assert_close(actual, expected, dtype=None)``: same shape and dtype, no NaN, within TOLERANCE of the dtype."""

    def check(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        got, want = actual.double().cpu(), expected.double().cpu()
        assert not torch.isnan(want).any(), "the reference gives NaN"
        assert not torch.isnan(got).any(), f"NaN at {torch.isnan(got).nonzero()[:5].tolist()}"
        if not want.numel():
            return
        error = (got - want).abs()
        bound = TOLERANCE[dtype or actual.dtype] * max(want.square().mean().sqrt().item(), 1e-6)
        # big values carry errors of their own size
        worst = (error - TOLERANCE[dtype or actual.dtype] * want.abs()).max().item()
        assert worst <= bound, f"error {error.max().item():.3g}, {worst:.3g} over relative, allowed {bound:.3g}"

    return check
