"""The decode workers: isolation, replacement, deadlines, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from triptych.python_models import process
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.families.base import FrameSampling
from triptych.python_models.media.pool import DecodePool, audio_job, decode, video_job

Make = Callable[..., bytes]


def job(**options: Any) -> dict[str, Any]:
    return video_job(asdict(FrameSampling(**options)), 10**6, 768)


def with_pool(body: Callable[[DecodePool], Awaitable[None]], size: int = 1) -> None:
    async def run() -> None:
        pool = DecodePool(size)
        try:
            await body(pool)
        finally:
            await pool.close()
            assert pool.pids == []

    asyncio.run(run())


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    before = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= before


def gone(pid: int, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_decodes_and_stays(make_clip: Make, make_m4a: Make) -> None:
    async def body(pool: DecodePool) -> None:
        await pool.start()
        (pid,) = pool.pids
        decoded = await decode(pool, job(num_frames=4), make_clip(10, 10))
        frames = decoded.array(np.uint8)
        assert frames.shape == (4, 48, 64, 3)
        assert frames.flags.writeable
        assert np.abs(frames[:, 36, 48, 0].astype(int) - 20 * np.array([0, 3, 6, 9])).max() <= 8
        assert (decoded.about["total_frames"], decoded.about["source_fps"]) == (10, 10.0)
        sound = await decode(pool, audio_job(10), make_m4a(seconds=0.5))
        assert sound.about["rate"] == 44100
        assert sound.array(np.float32).size / 44100 == pytest.approx(0.5, abs=0.1)
        for bad in (b"\0", b"garbage" * 1000, make_clip(10, 10)[:500]):
            with pytest.raises(TriptychError) as caught:
                await decode(pool, job(), bad)
            assert caught.value.kind is ErrorKind.INVALID_MEDIA
        assert pool.pids == [pid]

    with_pool(body)


def test_killed_worker_fails_one_request_and_is_replaced(make_clip: Make) -> None:
    async def body(pool: DecodePool) -> None:
        await pool.start()
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.ensure_future(decode(pool, job(), make_clip(10, 10)))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(TriptychError, match="signal SIGKILL") as caught:
            await running
        assert caught.value.kind is ErrorKind.STAGE_FAILED
        assert (await decode(pool, job(), make_clip(10, 10))).shape == (4, 48, 64, 3)
        assert pid not in pool.pids

    with_pool(body)


def test_worker_killed_while_idle_is_not_noticed(make_clip: Make) -> None:
    async def body(pool: DecodePool) -> None:
        await pool.start()
        os.kill(pool.pids[0], signal.SIGKILL)
        assert gone(pool.pids[0])
        assert (await decode(pool, job(), make_clip(10, 10))).shape[0] == 4

    with_pool(body)


def test_crash_of_decord_is_tried_again_with_av(make_clip: Make) -> None:
    async def body(pool: DecodePool) -> None:
        await pool.start()
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.ensure_future(decode(pool, job(), make_clip(10, 10)))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGSEGV)
        os.kill(pid, signal.SIGCONT)
        assert (await running).shape == (4, 48, 64, 3)
        (second,) = pool.pids
        assert second != pid
        # a file that crashes the last decoder is at fault itself
        os.kill(second, signal.SIGSTOP)
        running = asyncio.ensure_future(decode(pool, job() | {"decoders": ["av"]}, make_clip(10, 10)))
        await asyncio.sleep(0.1)
        os.kill(second, signal.SIGSEGV)
        os.kill(second, signal.SIGCONT)
        with pytest.raises(TriptychError) as caught:
            await running
        assert caught.value.kind is ErrorKind.INVALID_MEDIA

    with_pool(body)


def test_hang_of_decord_is_tried_again_with_av(make_clip: Make) -> None:
    async def body(pool: DecodePool) -> None:
        await pool.start()
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        assert (await decode(pool, job(), make_clip(10, 10), 0.3)).shape == (4, 48, 64, 3)
        assert gone(pid)
        # the last decoder is not hurried
        assert (await decode(pool, job() | {"decoders": ["av"]}, make_clip(10, 10), 1e-6)).shape == (4, 48, 64, 3)

    with_pool(body)


def test_hung_worker_is_killed_when_the_call_is_given_up(make_clip: Make) -> None:
    async def body(pool: DecodePool) -> None:
        await pool.start()
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(decode(pool, job(), make_clip(10, 10)), 0.2)
        assert gone(pid)
        assert (await decode(pool, job(), make_clip(10, 10))).shape[0] == 4

    with_pool(body)


def test_at_most_size_workers(make_clip: Make) -> None:
    async def body(pool: DecodePool) -> None:
        data = make_clip(10, 10)
        most = 0

        async def one() -> None:
            nonlocal most
            await decode(pool, job(), data)
            most = max(most, len(pool.pids))

        await asyncio.gather(*(one() for _ in range(8)))
        assert most == 2

    with_pool(body, size=2)


def test_worker_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_BOOT", "raise SystemExit(3)")

    async def body(pool: DecodePool) -> None:
        with pytest.raises(TriptychError, match="exit code 3"):
            await pool.start()

    with_pool(body)


def test_workers_die_with_their_owner(tmp_path: Path) -> None:
    """Even one that is stopped in the middle of a job, and even when the owner is killed outright."""
    script = tmp_path / "owner.py"
    script.write_text(
        textwrap.dedent(
            """
            import asyncio, os, signal
            from triptych.python_models.media.pool import DecodePool, audio_job

            async def main():
                pool = DecodePool(2)
                await pool.start()
                first = pool.pids[0]
                os.kill(first, signal.SIGSTOP)
                task = asyncio.ensure_future(pool.run(audio_job(1), b"x"))
                await asyncio.sleep(0.1)
                await pool.start()
                print(*pool.pids, flush=True)
                await asyncio.sleep(60)

            asyncio.run(main())
            """
        )
    )
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
    finally:
        owner.kill()
        owner.wait()
        assert owner.stdout is not None
        owner.stdout.close()
    assert all(gone(pid) for pid in pids)


def test_worker_looks_for_modules_where_its_owner_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "soundfile.py").write_text("raise SystemExit(42)")

    async def body(pool: DecodePool) -> None:
        with pytest.raises(TriptychError, match="exit code 42"):
            await pool.start()

    with_pool(body)


def test_worker_never_loads_torch() -> None:
    code = "import sys, triptych.python_models.media.worker, decord, av; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_worker_has_no_secrets_and_no_core_dumps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2")

    async def body(pool: DecodePool) -> None:
        await pool.start()
        (pid,) = pool.pids
        assert "SOME_TOKEN" not in psutil.Process(pid).environ()
        assert psutil.Process(pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert psutil.Process(pid).cwd() == "/"
        # decoders' native logs hold pieces of the caller's file
        assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == [os.devnull] * 3

    with_pool(body)
