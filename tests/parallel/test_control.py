"""The control plane with a fake model: every rank computes the same steps, and no rank is missed for long."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import parallel_fakes
import psutil
import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.language_model.runner.memory import CPU_BYTES
from triptych.python_models.language_model.runner.parallel import watch
from triptych.python_models.language_model.runner.parallel.member import Recipe
from triptych.python_models.language_model.runner.parallel.runner import ParallelRunner
from triptych.python_models.language_model.runner.parallel.wire import pack, unpack
from triptych.python_models.language_model.runner.step import MediaRows, Slice

MakeGroup = Callable[..., ParallelRunner]


def piece(ids: list[int], start: int, blocks: list[int], **options: object) -> Slice:
    tokens = np.array(ids, dtype=np.int64)
    positions = np.arange(start, start + len(ids), dtype=np.int64) * np.array([[1], [2], [3]])
    tables = np.array(blocks, dtype=np.int32), np.array(blocks[-1:], dtype=np.int32)
    return Slice(tokens, positions, start, tables, **options)  # type: ignore[arg-type]


def life(count: int = 12) -> list[list[Slice]]:
    """Steps of two requests: chunks with media, decodes with tokens the host does not know, drafts."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(2, 6)).astype(np.float32))
    media = MediaRows(np.array([1, 2]), rows), MediaRows(np.array([0]), rows[:1].bfloat16())
    steps = [
        [piece([5, 6, 7, 8, 9], 0, [3, 9], media=media, spans=((1, 3),), num_logits=0)],
        [piece([1, 2, 3], 5, [3, 9], slot=2), piece([4, 4], 0, [11], slot=5, num_logits=2)],
    ]
    for k in range(count):
        blocks = [3, 9, 20, 21, 22][: (8 + k) // 4 + 1]
        steps.append([piece([0], 8 + k, blocks, slot=2, first_on_device=True), piece([k], 2, [11], slot=5)])
    return steps


def tokens(runner: object, steps: list[list[Slice]]) -> list[int]:
    """Greedy tokens, written to last_tokens as the sampler does."""
    found: list[int] = []
    for slices in steps:
        logits = runner.forward(slices)  # type: ignore[attr-defined]
        new = logits.argmax(-1)
        row = 0
        for part in slices:
            row += part.num_logits
            if part.num_logits:
                runner.last_tokens[part.slot] = new[row - 1]  # type: ignore[attr-defined]
        found += new.tolist()
    return found


def equal(one: Slice, two: Slice) -> bool:
    for field in dataclasses.fields(Slice):
        mine, theirs = getattr(one, field.name), getattr(two, field.name)
        if field.name == "media":
            same = all(
                np.array_equal(a.positions, b.positions)
                and torch.equal(a.rows, b.rows)
                and a.rows.dtype == b.rows.dtype
                for a, b in zip(mine, theirs, strict=True)
            )
        elif field.name == "block_tables":
            same = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True))
        elif isinstance(mine, np.ndarray):
            same = np.array_equal(mine, theirs) and mine.dtype == theirs.dtype
        else:
            same = mine == theirs and type(mine) is type(theirs)
        if not same:
            return False
    return True


def test_slices_travel_whole() -> None:
    for number, slices in enumerate(life()):
        rows = iter([media.rows for part in slices for media in part.media])

        def receive(shape: tuple[int, int], dtype: torch.dtype, rows: object = rows) -> torch.Tensor:
            found: torch.Tensor = next(rows)  # type: ignore[call-overload]
            assert (tuple(found.shape), found.dtype) == (shape, dtype)
            return found

        step, found = unpack(bytearray(pack(number, slices)), receive)
        assert step == number
        assert len(found) == len(slices)
        assert all(map(equal, slices, found))


def test_ranks_answer_like_one(make_group: MakeGroup, faults: list[TriptychError]) -> None:
    one = parallel_fakes.alone()
    one.allocate([64, 64])
    group = make_group(3)
    expected = tokens(one, life())
    assert len(set(expected)) > 5
    assert tokens(group, life()) == expected
    for runner in (one, group):
        runner.scrub(1, [3, 9])
    again = [[piece([3], 5, [3, 9], slot=1)]]
    assert tokens(group, again) == tokens(one, again) != tokens(one, [[piece([3], 5, [3, 10], slot=1)]])
    group.warm_up(7)
    assert group.memory() == (CPU_BYTES, CPU_BYTES)
    # an error that all ranks have at the same place ends nothing
    for _ in range(2):
        with pytest.raises(ValueError, match="refuses 1001"):
            group.forward([piece([1001], 0, [3])])
        assert tokens(group, life()) == expected
    assert not faults


def run(group: ParallelRunner, steps: Iterable[list[Slice]]) -> None:
    for slices in steps:
        group.forward(slices)


def fails(group: ParallelRunner, *expected: str, steps: list[list[Slice]] | None = None) -> float:
    """Seconds until a step fails with STAGE_DEAD and these words; every later call then fails in the same way."""
    began = time.monotonic()
    with pytest.raises(TriptychError) as caught:
        run(group, steps or itertools.cycle(life()))
    took = time.monotonic() - began
    assert caught.value.kind is ErrorKind.STAGE_DEAD
    for words in expected:
        assert words in caught.value.message
    for call in (lambda: group.forward(life()[0]), lambda: group.scrub(0, [1]), lambda: group.allocate([1, 1])):
        with pytest.raises(TriptychError, match=r"rank \d"):
            call()
    assert gone(group.pids)
    return took


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_the_group(make_group: MakeGroup, faults: list[TriptychError], rank: int) -> None:
    group = make_group(fail_rank=rank)
    assert fails(group, f"rank {rank}", "refuses 1002", steps=[life()[0], [piece([1002], 0, [3])]]) < 10
    assert len(faults) == 1


def test_a_rank_that_dies_is_named(make_group: MakeGroup, faults: list[TriptychError]) -> None:
    group = make_group(fail_rank=1)
    words = ("rank 1", "exit code 7", "going down")
    assert fails(group, *words, steps=[life()[0], [piece([1003], 0, [3])]]) < 10
    assert [fault.message for fault in faults] == [group._watch.fault.message]  # type: ignore[union-attr]


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "signal SIGKILL"), (signal.SIGSTOP, "no sign of life")])
def test_a_killed_or_stopped_rank_fails_the_step(
    make_group: MakeGroup, faults: list[TriptychError], number: signal.Signals, words: str
) -> None:
    group = make_group(2)
    pid = group.pids[0]
    threading.Timer(0.3, os.kill, (pid, number)).start()
    assert fails(group, "rank 1", f"process {pid}", words) < 10
    assert len(faults) == 1


def test_a_rank_that_hangs_in_a_step_is_named(make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "STEP_S", 2.0)
    monkeypatch.setattr(watch, "_EARLY_STEPS", 0)
    group = make_group(3, fail_rank=2)
    assert fails(group, "rank 2", "stuck: step 2 is being computed", steps=[life()[0], [piece([1004], 0, [3])]]) < 10


def test_an_idle_group_notices_too(make_group: MakeGroup, faults: list[TriptychError]) -> None:
    group = make_group()
    os.kill(group.pids[0], signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not faults and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "rank 1" in faults[0].message


@pytest.mark.parametrize(
    ("option", "kind", "words"),
    [
        ("raise", ErrorKind.STAGE_FAILED, ["rank 1", "MemoryError: only 3 bytes are left"]),
        ("die", ErrorKind.STAGE_DEAD, ["rank 1", "exit code 3", "no such file: weights.bin"]),
    ],
)
def test_a_worker_that_cannot_start_says_why(
    make_group: MakeGroup, option: str, kind: ErrorKind, words: list[str]
) -> None:
    with pytest.raises(TriptychError) as caught:
        make_group(**{option: 1})
    assert caught.value.kind is kind
    assert all(word in caught.value.message for word in words), caught.value.message


def test_an_error_of_a_call_reaches_the_caller(make_group: MakeGroup) -> None:
    group = make_group()
    with pytest.raises(TriptychError, match=r"rank 1 .*an unlucky number"):
        group.warm_up(13)


def test_rank_0_that_cannot_build_says_so_itself(make_group: MakeGroup) -> None:
    with pytest.raises(MemoryError, match="3 bytes"):
        make_group(**{"raise": 0})


def test_a_group_while_there_is_one(make_group: MakeGroup) -> None:
    group = make_group()
    with pytest.raises(TriptychError, match="member of another"):
        ParallelRunner(Recipe("parallel_fakes:build", {}), ["cpu", "cpu"])
    assert tokens(group, life()[:1]) == []


def test_workers_die_with_rank_0(tmp_path: Path) -> None:
    """Even a stopped one, and even when rank 0 is killed outright."""
    script = tmp_path / "owner.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from triptych.python_models.language_model.runner.parallel.member import Recipe
            from triptych.python_models.language_model.runner.parallel.runner import ParallelRunner
            group = ParallelRunner(Recipe("parallel_fakes:build", {{}}, dtype="float32"), ["cpu"] * 3)
            os.kill(group.pids[1], signal.SIGSTOP)
            print(*group.pids, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2, result.stderr
    assert gone(pids)


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
