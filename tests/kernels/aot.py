"""Compile kernels for an H200 (sm_90) on any machine, and read what the binary takes.

The tests' process may run kernels in Triton's interpreter, whose kernels cannot be compiled: so one process of its own,
this file run as a script, does all the compiling.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

# bytes of shared memory one program may take on sm_90
SHARED_LIMIT = 227 * 1024


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes.

    Attributes:
        shared: bytes of shared memory per program.
        registers: per thread.
        spilled: bytes of local memory per thread, 0 without spills.
        seconds: what compiling took.
        ptx: the kernel's PTX.
    """

    shared: int
    registers: int
    spilled: int
    seconds: float
    ptx: str


def compile_sm90(fn: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any], **options: Any) -> Compiled:
    """Compile a ``@triton.jit`` function for sm_90.

    Args:
        fn: the kernel, a jitted (or interpreted) function at the top level of its module.
        signature: type of every argument that is no constexpr: "*bf16", "i32", "fp32", "*fp8e4nv". Two suffixes, as a
            launch would find out by itself: ":16" says divisible by 16 (aligned pointers and strides).
        constexprs: value of every constexpr, by name; None for an absent pointer.
        options: num_warps, num_stages, maxnreg, launch_pdl.

    Raises:
        AssertionError: it does not compile; the message is the compiler's.
    """
    fn = getattr(fn, "fn", fn)
    job = {
        "kernel": f"{fn.__module__}:{fn.__name__}",
        "signature": dict(signature),
        "constexprs": dict(constexprs),
        "options": options,
    }
    worker = _worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    # of Triton's objects only dtypes travel
    worker.stdin.write(json.dumps(job, default=lambda dtype: {"dtype": dtype.name}) + "\n")
    worker.stdin.flush()
    answer = json.loads(worker.stdout.readline())
    assert "error" not in answer, f"{job}\n{answer['error']}"
    return Compiled(**answer)


@cache
def _worker() -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    atexit.register(_stop, worker)
    return worker


def _stop(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.close()
    worker.wait()
    worker.stdout.close()


def _compile(job: dict[str, Any]) -> Compiled:
    import time

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job["kernel"].split(":")
    fn = getattr(importlib.import_module(module), name)
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    given = dict(job["signature"])
    values = dict(job["constexprs"])
    for index, arg in enumerate(fn.arg_names):
        if arg in values:
            signature[arg] = "constexpr"
            value = values.pop(arg)
            constexprs[(index,)] = tl.dtype(value["dtype"]) if isinstance(value, dict) else value
        elif arg in given:
            kind, _, divisible = given.pop(arg).partition(":")
            signature[arg] = kind
            if divisible:
                attrs[(index,)] = [["tt.divisibility", int(divisible)]]
        else:
            raise KeyError(f"argument {arg} has neither a type nor a value")
    if given or values:
        raise KeyError(f"{name} has no arguments {sorted({**given, **values})}")
    start = time.perf_counter()
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=job["options"])
    seconds = time.perf_counter() - start
    registers, spilled = _usage(done.asm["cubin"])
    return Compiled(done.metadata.shared, registers, spilled, round(seconds, 2), done.asm["ptx"])


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(numbers["REG"]), max(int(numbers["STACK"]), int(numbers["LOCAL"]))


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    # what the compiler prints must not come between the answers
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = asdict(_compile(json.loads(line)))
        except Exception as error:  # noqa: BLE001  any of the compiler's errors belongs to the asking test
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
