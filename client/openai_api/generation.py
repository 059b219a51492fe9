"""One running request, from the shim's side."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from triptych.client.sdk import wire
from triptych.python_models.contract.delta import Delta, put
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.tensors import ENSEMBLES

from .observation import Part
from .triton import Triton

log = logging.getLogger("triptych.shim")

# A cancel that overtakes its request on the way between two stages finds nothing to end, so it is sent again.
_CANCEL_PAUSES_S = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0)

ABORTED = "abort"
"""Finish reason of an answer that was ended by :meth:`Generation.abort`."""


class Generation:
    """Reads one ensemble request's answers as fast as they come, whatever the HTTP client's pace.

    What the client has not taken yet is kept as one delta per choice.

    Args:
        triton: the server.
        part: what is told of it later; its id is unique among running requests.
        message: the ``ModelInferRequest``.
        num_choices: answers that it asks for.
        start_limit_s: seconds until the engine must have accepted the request.
        silence_limit_s: seconds between two signs of life from then on.
        on_end: called once when nothing more will be read.
        news: set whenever :meth:`take` has something new; None for an event of its own.
    """

    def __init__(
        self,
        triton: Triton,
        part: Part,
        message: Any,
        num_choices: int,
        start_limit_s: float,
        silence_limit_s: float,
        on_end: Callable[[Generation], None],
        news: asyncio.Event | None = None,
    ) -> None:
        self.id = part.id
        self._part = part
        self.stages = tuple(step.stage for step in ENSEMBLES[message.model_name].steps)
        self.accepted = False
        self._triton = triton
        self._silence_limit_s = silence_limit_s
        self._start_limit_s = start_limit_s
        self._deadline = time.monotonic() + start_limit_s
        self._on_end = on_end
        self._waiting: dict[int, Delta] = {}
        self._error: TriptychError | None = None
        self._news = news or asyncio.Event()
        self._open = set(range(num_choices))
        self._finished = False
        self._reader = asyncio.create_task(self._read(message), name=f"read-{part.id}")

    @property
    def failed(self) -> TriptychError | None:
        """How the request failed."""
        return self._error

    @property
    def finished(self) -> bool:
        """Nothing more is read."""
        return self._finished

    async def next(self) -> list[Delta]:
        """What came since the last call: at least one delta, at most one of each choice.

        Raises:
            TriptychError: how the request failed, CANCELLED after :meth:`cancel`.
        """
        await self._news.wait()
        found = self.take()
        if self._error is None:
            self._news.clear()
        return found

    def take(self) -> list[Delta]:
        """What came since the last call, without waiting for it; raises as :meth:`next` does."""
        # The deltas before an error still count.
        if not self._waiting and self._error is not None:
            raise self._error
        found = list(self._waiting.values())
        self._waiting.clear()
        return found

    def overdue(self, now: float) -> TriptychError | None:
        """The error to fail it with where it has been silent for too long."""
        if self._finished or now < self._deadline:
            return None
        if self.accepted:
            return TriptychError(
                ErrorKind.STAGE_DEAD,
                f"language_model gave no sign of life for {self._silence_limit_s:g} s",
                stage="language_model",
            )
        return TriptychError(
            ErrorKind.TIMEOUT, f"the request did not reach the engine within {self._start_limit_s:g} s; try again later"
        )

    async def cancel(self, error: TriptychError | None = None) -> None:
        """End it in every stage; returns when the server has let go of it, or does not answer.

        Args:
            error: what :meth:`next` raises from now on; CANCELLED by default.
        """
        if self._finished:
            return
        self._end(error or TriptychError(ErrorKind.CANCELLED, "the request was cancelled"))
        await self._cancel_everywhere()

    async def abort(self) -> None:
        """As :meth:`cancel`, but to whoever reads it that is the answer's end: choices that are open end with the
        finish reason :data:`ABORTED`.
        """
        if self._finished:
            return
        self._finished = True
        for index in sorted(self._open):
            put(self._waiting, Delta(finish_reason=ABORTED, index=index))
        self._news.set()
        self._on_end(self)
        await self._cancel_everywhere()

    async def _cancel_everywhere(self) -> None:
        for pause in _CANCEL_PAUSES_S:
            await asyncio.gather(*(self._cancel_in(stage) for stage in self.stages))
            done, _ = await asyncio.wait([self._reader], timeout=pause)
            if done:
                return
        self._reader.cancel()

    async def _cancel_in(self, stage: str) -> None:
        try:
            await self._triton.control(stage, cancel=[self.id], timeout_s=2.0)
        except TriptychError:
            # A stage that is gone has nothing left to cancel; the monitor deals with it.
            return

    async def _read(self, message: Any) -> None:
        part = self._part
        answers = self._triton.infer(message, part.headers)
        # The media in it are not needed once they are sent.
        del message
        try:
            async for response in answers:
                self._deadline = time.monotonic() + self._silence_limit_s
                self.accepted = True
                delta = wire.delta_of(response)
                if delta is None or self._finished:
                    continue
                put(self._waiting, delta)
                self._news.set()
                if part.text is not None:
                    part.text.append(delta.text)
                if delta.finish_reason:
                    self._open.discard(delta.index)
                    part.end_choice(delta)
                if not self._open:
                    self._finished = True
                    self._on_end(self)
            self._end(TriptychError(ErrorKind.STAGE_FAILED, "the answer ended without a finish reason"))
        except TriptychError as error:
            self._end(error)
        except Exception as error:
            log.exception("the answer cannot be read", extra={"id": self.id})
            self._end(TriptychError(ErrorKind.STAGE_FAILED, f"the answer cannot be read: {type(error).__name__}"))

    def _end(self, error: TriptychError) -> None:
        if not self._finished:
            self._finished = True
            self._error = self._part.error = error
            self._news.set()
            self._on_end(self)


class Generations:
    """Those of several prompts as one: choices are numbered one after the other, the first failure is that of all.

    Args:
        members: the generations, whose ``news`` it is.
        offsets: number of the first choice of each.
        news: of all of them.
    """

    def __init__(self, members: Sequence[Generation], offsets: Sequence[int], news: asyncio.Event) -> None:
        self.id = members[0].id
        self.members = tuple(members)
        self._offsets = tuple(offsets)
        self._news = news
        self._begun = False

    async def next(self) -> list[Delta]:
        """As :meth:`Generation.next`, of all of them; the first time only once the engine has accepted all."""
        if not self._begun:
            await self._begin()
        while True:
            await self._news.wait()
            self._news.clear()
            found: list[Delta] = []
            for place, (member, offset) in enumerate(zip(self.members, self._offsets, strict=True)):
                try:
                    found += [replace(delta, index=delta.index + offset) for delta in member.take()]
                except TriptychError as error:
                    if not found:
                        raise _of_prompt(place, error) from None
                    # what the others have comes first
                    self._news.set()
            if found:
                return found

    async def _begin(self) -> None:
        """Wait until each is accepted, or has ended without; raises how the first one failed."""
        while True:
            for place, member in enumerate(self.members):
                if member.failed is not None:
                    raise _of_prompt(place, member.failed)
            if all(member.accepted or member.finished for member in self.members):
                break
            await self._news.wait()
            self._news.clear()
        self._begun = True
        self._news.set()

    async def cancel(self, error: TriptychError | None = None) -> None:
        """As :meth:`Generation.cancel`, of all of them."""
        await asyncio.gather(*(member.cancel(error) for member in self.members))


def _of_prompt(place: int, error: TriptychError) -> TriptychError:
    """The error of one of several prompts, whose fields then have its number: ``prompt.text[2]``."""

    def numbered(text: str) -> str:
        return re.sub(r"\bprompt\.(text|token_ids|media)\b", rf"prompt.\1[{place}]", text)

    param = None if error.param is None else re.sub(r"^prompt$", f"prompt.text[{place}]", numbered(error.param))
    return replace(error, message=numbered(error.message), param=param)
