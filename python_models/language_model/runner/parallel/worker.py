"""A worker: the process of a rank other than 0. It does what rank 0 tells it and ends when rank 0 does."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import torch

from ....contract.errors import ErrorKind, TriptychError
from ....process import end_with_parent
from ..memory import device_memory
from .board import Board
from .group import Group
from .member import Member, RankRunner, Recipe
from .wire import Kind, Reader, json_frame, unpack

PULSE_S = 0.5
_POLL_S = 0.25


def serve(about: str) -> None:
    """Work until rank 0 closes its end or dies.

    Args:
        about: JSON: ``rank``, ``size``, ``device``, ``store``, ``recipe``, ``parent`` (process id of rank 0) and
            ``fds`` (this end of the socket, the board).
    """
    told = json.loads(about)
    if not end_with_parent(told["parent"]):
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    board = Board(told["size"], told["fds"][1])
    connection = socket.socket(fileno=told["fds"][0])
    connection.settimeout(_POLL_S)
    worker = _Worker(told, connection, board)
    threading.Thread(target=worker.beat, name="triptych-pulse", daemon=True).start()
    try:
        worker.run()
    except BaseException:  # noqa: BLE001 - its last words go to rank 0; nothing of it may hold up the end
        traceback.print_exc()
        os._exit(1)
    # taking torch and NCCL apart can wait for ranks that are gone
    os._exit(0)


class _Worker:
    def __init__(self, told: dict[str, Any], connection: socket.socket, board: Board) -> None:
        self._told = told
        self._rank: int = told["rank"]
        self._device = torch.device(told["device"])
        self._connection = connection
        self._board = board
        self._reader = Reader(connection)
        self._recipe = Recipe(**told["recipe"])
        self._made: Group | None = None
        self._built: RankRunner | None = None
        self._on_device: deque[tuple[int, Any]] = deque()

    @property
    def _group(self) -> Group:
        assert self._made is not None, "join comes first"
        return self._made

    @property
    def _runner(self) -> RankRunner:
        assert self._built is not None, "build comes before this"
        return self._built

    def beat(self) -> None:
        """Give signs of life as long as rank 0 lives."""
        while os.getppid() == self._told["parent"]:
            self._board.pulse(self._rank, 0 if self._made is None else self._made.num_calls)
            time.sleep(PULSE_S)
        os._exit(1)

    def run(self) -> None:
        """Do what comes, one after the other."""
        with torch.inference_mode():
            while True:
                self._look_at_device()
                try:
                    kind, body = self._reader.read()
                except TimeoutError:
                    continue
                except EOFError:
                    return
                if kind is Kind.STEP:
                    self._step(body)
                else:
                    self._call(**json.loads(bytes(body)))

    def _step(self, body: bytearray) -> None:
        step = int.from_bytes(body[:8], sys.byteorder)
        self._board.received(self._rank, step)
        try:
            _, slices = unpack(body, self._receive)
            if any(piece.first_on_device for piece in slices):
                self._group.broadcast(self._runner.last_tokens)
            self._runner.forward(slices)
        except Exception as error:  # noqa: BLE001 - rank 0 decides what it means
            traceback.print_exc()
            report = {"step": step, "error": _text(error), "num_collectives": self._group.num_calls}
            self._send(json_frame(Kind.FAILED, report))
            return
        self._board.queued(self._rank, step)
        if self._device.type == "cuda":
            self._on_device.append((step, torch.cuda.current_stream().record_event()))
        else:
            self._board.done(self._rank, step)

    def _look_at_device(self) -> None:
        while self._on_device and self._on_device[0][1].query():
            self._board.done(self._rank, self._on_device.popleft()[0])

    def _receive(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        rows = torch.empty(shape, dtype=dtype, device=self._device)
        self._group.broadcast(rows)
        return rows

    def _call(self, method: str, args: list[Any], reply: bool) -> None:
        if not reply:
            getattr(self._runner, method)(*args)
            return
        answer: dict[str, Any]
        try:
            own = {"hello": self._hello, "join": self._join, "build": self._build, "memory": self._memory}
            answer = {"value": (own.get(method) or getattr(self._runner, method))(*args)}
        except TriptychError as error:
            answer = {"kind": error.kind.value, "error": error.message, "param": error.param}
        except Exception as error:  # noqa: BLE001 - rank 0 raises it
            traceback.print_exc()
            answer = {"kind": ErrorKind.STAGE_FAILED.value, "error": _text(error), "param": None}
        self._send(json_frame(Kind.RESULT, answer))

    def _hello(self) -> None:
        """Say that this process has come up."""

    def _join(self) -> None:
        told, recipe = self._told, self._recipe
        dtype = getattr(torch, recipe.dtype)
        self._made = Group(
            self._rank, told["size"], told["device"], Path(told["store"]), one_shot=recipe.one_shot, dtype=dtype
        )

    def _build(self) -> list[int]:
        member = Member(self._rank, self._told["size"], self._recipe.expert_parallel, self._told["device"], self._group)
        self._built = self._recipe.make(member)
        return list(self._built.bytes_per_token)

    def _memory(self) -> list[int]:
        return list(device_memory(self._told["device"]))

    def _send(self, message: bytes) -> None:
        self._connection.settimeout(None)
        try:
            self._connection.sendall(message)
        finally:
            self._connection.settimeout(_POLL_S)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
