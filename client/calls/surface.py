"""``chat`` and ``generate``, alone, streamed and in batches, over anything that can run a request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

from triptych.python_models.contract.errors import invalid
from triptych.python_models.contract.sampling import SamplingParams

from .batch import Batch, ItemError, Make, whole_batch
from .messages import Conversation
from .request import Call, Prompt, chat_call, prompt_call
from .results import Result
from .stream import AsyncStream, Handle, Sink, Start, Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .request import ChatOptions, PromptOptions

_T = TypeVar("_T")

Sampling = SamplingParams | Mapping[str, Any]
Open = Callable[[Call, Sink], Handle]


class SyncCalls:
    """The calls of ``Engine`` and ``Client``.

    Args:
        start: begins a request and returns at once.
        window: requests of a batch in flight at most.
    """

    def __init__(self, start: Open, window: int) -> None:
        self._start = start
        self._window = window

    @overload
    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        sampling: Sampling | None = None,
        **options: Unpack[ChatOptions],
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        *,
        sampling: Sampling | list[Sampling] | None = None,
        return_exceptions: Literal[False] = False,
        progress: bool | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Result]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        *,
        sampling: Sampling | list[Sampling] | None = None,
        return_exceptions: Literal[True],
        progress: bool | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Result | ItemError]: ...

    def chat(
        self,
        messages: Any,
        *,
        sampling: Any = None,
        return_exceptions: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """Answer a conversation, or a list of conversations.

        Args:
            messages: one conversation, ``[{"role": "user", "content": ...}, ...]`` or a string of the user's; or a list
                of them. Content parts: docs/python.md.
            sampling: parameters, or a list with one for each conversation; keywords win over them.
            return_exceptions: of a list: put the error of a conversation that fails into its place, as an
                :class:`~.batch.ItemError`. Otherwise all others are finished and a :class:`~.batch.BatchError` with
                their results is raised.
            progress: of a list: show a bar on standard error; None: where that is a terminal.
            options: see :class:`~.request.ChatOptions`.

        Returns:
            The answer, or a list of answers in the order of the conversations.

        Raises:
            TriptychError: what is wrong with an argument, or how the request failed.
        """
        if not _is_batch_of_chats(messages):
            return self._one(_chat_maker(messages, options, sampling, stream=False))
        makers = [
            _chat_maker(item, options, chosen, stream=False)
            for item, chosen in zip(messages, _each(sampling, len(messages), "sampling"), strict=True)
        ]
        return _finish(self._batch(makers, progress).run(), return_exceptions)

    def stream_chat(
        self, messages: Conversation, *, sampling: Sampling | None = None, **options: Unpack[ChatOptions]
    ) -> Stream:
        """As :meth:`chat` for one conversation: its deltas as they come."""
        return self._stream(_chat_maker(messages, options, sampling, stream=True))

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        sampling: Sampling | None = None,
        **options: Unpack[PromptOptions],
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        sampling: Sampling | list[Sampling] | None = None,
        return_exceptions: Literal[False] = False,
        progress: bool | None = None,
        **options: Unpack[PromptOptions],
    ) -> list[Result]: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        sampling: Sampling | list[Sampling] | None = None,
        return_exceptions: Literal[True],
        progress: bool | None = None,
        **options: Unpack[PromptOptions],
    ) -> list[Result | ItemError]: ...

    def generate(
        self,
        prompt: Any,
        *,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        sampling: Any = None,
        return_exceptions: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """Go on with a raw prompt, or with each of a list of prompts; no chat template is applied.

        Args:
            prompt: text, or a list of token ids; or a list of texts, or of lists of token ids. A medium's place is
                where the prompt has what the checkpoint's processor expects for it (``<|image_pad|>`` ...).
            images, videos, audios: of one prompt: a medium or a list of media in the order of their places. Of a list
                of prompts: a list with one such entry, or None, for each.
            sampling, return_exceptions, progress: as in :meth:`chat`.
            options: see :class:`~.request.PromptOptions`.

        Returns:
            The answer, or a list of answers in the order of the prompts.

        Raises:
            TriptychError: what is wrong with an argument, or how the request failed.
        """
        media = {"images": images, "videos": videos, "audios": audios}
        if not _is_batch_of_prompts(prompt):
            return self._one(_prompt_maker(prompt, media, options, sampling, stream=False))
        makers = _prompt_makers(prompt, media, options, sampling)
        return _finish(self._batch(makers, progress).run(), return_exceptions)

    def stream_generate(
        self,
        prompt: Prompt,
        *,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        sampling: Sampling | None = None,
        **options: Unpack[PromptOptions],
    ) -> Stream:
        """As :meth:`generate` for one prompt: the deltas as they come."""
        media = {"images": images, "videos": videos, "audios": audios}
        return self._stream(_prompt_maker(prompt, media, options, sampling, stream=True))

    def _one(self, make: Make) -> Result:
        with self._stream(make) as stream:
            return stream.result()

    def _stream(self, make: Make) -> Stream:
        call = make()
        return Stream(_starter(self._start, call), self, call.request.template.tools)

    def _batch(self, makers: list[Make], progress: bool | None) -> Batch:
        return Batch(_renaming(self._start), makers, self._window, progress)


class AsyncCalls:
    """The same calls for asyncio: those of ``AsyncClient``, and of ``Engine`` under names with ``async_``.

    Args:
        start: begins a request and returns at once; never called in the event loop's thread where media are encoded.
        window: requests of a batch in flight at most.
    """

    def __init__(self, start: Open, window: int) -> None:
        self._start = start
        self._window = window

    @overload
    async def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        sampling: Sampling | None = None,
        **options: Unpack[ChatOptions],
    ) -> Result: ...

    @overload
    async def chat(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        *,
        sampling: Sampling | list[Sampling] | None = None,
        return_exceptions: Literal[False] = False,
        progress: bool | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Result]: ...

    @overload
    async def chat(
        self,
        messages: Sequence[Sequence[Mapping[str, Any]]],
        *,
        sampling: Sampling | list[Sampling] | None = None,
        return_exceptions: Literal[True],
        progress: bool | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Result | ItemError]: ...

    async def chat(
        self,
        messages: Any,
        *,
        sampling: Any = None,
        return_exceptions: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """As :meth:`SyncCalls.chat`. Cancelling the task ends what it asked for."""
        if not _is_batch_of_chats(messages):
            return await self._one(_chat_maker(messages, options, sampling, stream=False))
        makers = [
            _chat_maker(item, options, chosen, stream=False)
            for item, chosen in zip(messages, _each(sampling, len(messages), "sampling"), strict=True)
        ]
        return _finish(await self._batch(makers, progress), return_exceptions)

    async def stream_chat(
        self, messages: Conversation, *, sampling: Sampling | None = None, **options: Unpack[ChatOptions]
    ) -> AsyncStream:
        """As :meth:`chat` for one conversation: ``async for delta in await client.stream_chat(...)``."""
        return await self._stream(_chat_maker(messages, options, sampling, stream=True))

    @overload
    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        sampling: Sampling | None = None,
        **options: Unpack[PromptOptions],
    ) -> Result: ...

    @overload
    async def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        sampling: Sampling | list[Sampling] | None = None,
        return_exceptions: Literal[False] = False,
        progress: bool | None = None,
        **options: Unpack[PromptOptions],
    ) -> list[Result]: ...

    @overload
    async def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        sampling: Sampling | list[Sampling] | None = None,
        return_exceptions: Literal[True],
        progress: bool | None = None,
        **options: Unpack[PromptOptions],
    ) -> list[Result | ItemError]: ...

    async def generate(
        self,
        prompt: Any,
        *,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        sampling: Any = None,
        return_exceptions: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """As :meth:`SyncCalls.generate`. Cancelling the task ends what it asked for."""
        media = {"images": images, "videos": videos, "audios": audios}
        if not _is_batch_of_prompts(prompt):
            return await self._one(_prompt_maker(prompt, media, options, sampling, stream=False))
        makers = _prompt_makers(prompt, media, options, sampling)
        return _finish(await self._batch(makers, progress), return_exceptions)

    async def stream_generate(
        self,
        prompt: Prompt,
        *,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        sampling: Sampling | None = None,
        **options: Unpack[PromptOptions],
    ) -> AsyncStream:
        """As :meth:`generate` for one prompt: ``async for delta in await client.stream_generate(...)``."""
        media = {"images": images, "videos": videos, "audios": audios}
        return await self._stream(_prompt_maker(prompt, media, options, sampling, stream=True))

    async def _stream(self, make: Make) -> AsyncStream:
        # files are read and pictures encoded there
        call = await asyncio.to_thread(make)
        return AsyncStream(_starter(self._start, call), self, call.request.template.tools)

    async def _one(self, make: Make) -> Result:
        async with await self._stream(make) as stream:
            return await stream.result()

    async def _batch(self, makers: list[Make], progress: bool | None) -> list[Result | ItemError]:
        batch = Batch(_renaming(self._start), makers, self._window, progress)
        try:
            return await _in_thread(batch.run)
        finally:
            batch.stop()


def _starter(start: Open, call: Call) -> Start:
    return lambda sink: _renaming(start)(call, sink)


def _renaming(start: Open) -> Open:
    """``start`` whose errors have the caller's names of fields."""

    def begin(call: Call, sink: Sink) -> Handle:
        names = call.in_callers_words
        return start(call, lambda item: sink(names(item) if isinstance(item, Exception) else item))

    return begin


def _chat_maker(messages: Any, options: Mapping[str, Any], sampling: Any, *, stream: bool) -> Make:
    return lambda: chat_call(messages, options, sampling, stream)


def _prompt_maker(
    prompt: Any, media: Mapping[str, Any], options: Mapping[str, Any], sampling: Any, *, stream: bool
) -> Make:
    return lambda: prompt_call(prompt, media, options, sampling, stream)


def _prompt_makers(prompts: Any, media: Mapping[str, Any], options: Mapping[str, Any], sampling: Any) -> list[Make]:
    count = len(prompts)
    for name, items in media.items():
        if items is not None and (not isinstance(items, (list, tuple)) or len(items) != count):
            raise invalid(f"{name} must be a list with one entry (a medium, a list of media or None) per prompt", name)
    columns = {name: [None] * count if items is None else list(items) for name, items in media.items()}
    return [
        _prompt_maker(prompt, {name: items[i] for name, items in columns.items()}, options, chosen, stream=False)
        for i, (prompt, chosen) in enumerate(zip(prompts, _each(sampling, count, "sampling"), strict=True))
    ]


def _each(value: Any, count: int, name: str) -> Sequence[Any]:
    """One for each item of a batch."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise invalid(f"{name} has {len(value)} entries; the batch has {count}", name)
    return value


def _is_batch_of_chats(messages: Any) -> bool:
    return not isinstance(messages, (str, Mapping)) and all(
        isinstance(item, Sequence) and not isinstance(item, Mapping) for item in messages
    )


def _is_batch_of_prompts(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and not (prompt and isinstance(prompt[0], int))


def _finish(results: list[Result | ItemError], return_exceptions: bool) -> Any:
    return results if return_exceptions else whole_batch(results)


async def _in_thread(work: Callable[[], _T]) -> _T:
    """Run something long in a thread of its own: those of the default executor are few."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast(_T, result))

    def run() -> None:
        try:
            outcome: tuple[_T | None, BaseException | None] = work(), None
        except BaseException as error:  # noqa: BLE001 - handed to the task that waits
            outcome = None, error
        # after the end of its loop nobody is left to take it
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="triptych-batch", daemon=True).start()
    return await done
