"""The offline engine: every stage of a deployment in this process, without a server."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from triptych.client.calls import AsyncCalls, Call, Handle, Sink, SyncCalls
from triptych.client.cli.options import resolve_model
from triptych.client.cli.parser import CommandError
from triptych.client.launcher import LauncherError, place
from triptych.python_models.contract import _check as check
from triptych.python_models.contract.errors import ErrorKind, TriptychError, invalid
from triptych.python_models.contract.settings import Settings
from triptych.python_models.contract.tensors import CHAT, CHAT_TEXT
from triptych.python_models.local import LocalEnsemble

# Requests of a batch in flight for each that may decode: some are preprocessed and encoded meanwhile.
_WINDOW = 2
# Settings that only a server has a use for.
_OF_SERVERS = ("preprocess_instances",)


class Engine(SyncCalls):
    """Answers in this process: the stages of ``triptych serve``, with their batching, caches and overlap.

    ``chat``, ``generate``, ``stream_chat`` and ``stream_generate`` wait in the calling thread; any number of threads
    may call at once. The ``async_`` ones do the same for asyncio. Leaving the ``with`` block or :meth:`close` frees
    all memory.

    Args:
        model: "builtin", a folder in Hugging Face layout, or a hub id.
        options: those of ``triptych serve`` under ``model and engine``, by their names with underscores: the fields of
            :class:`~triptych.python_models.contract.settings.Settings`. Where the command takes a JSON object, a dict
            will do.

    Attributes:
        settings: all options with their values.

    Raises:
        TriptychError: an option that is unknown or not allowed, or why the model cannot be loaded.
    """

    def __init__(self, model: str | os.PathLike[str] = "builtin", **options: Any) -> None:
        self.settings = _settings(os.fspath(model), options)
        ensemble = LocalEnsemble(self.settings, _device(self.settings))
        local = _Local(ensemble)
        window = min(_WINDOW * self.settings.max_running_requests, max(1, self.settings.max_queued_requests))
        super().__init__(local.start, window)
        self._local = local
        calls = AsyncCalls(local.start, window)
        self.async_chat = calls.chat
        self.async_generate = calls.generate
        self.async_stream_chat = calls.stream_chat
        self.async_stream_generate = calls.stream_generate
        # stages have threads and processes, which would outlive an engine that nobody closed
        self._closer = weakref.finalize(self, local.close)

    def close(self) -> None:
        """End every request with an error, stop all threads and processes, free memory."""
        self._closer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Local:
    """Begins requests in the stages of this process. Holds no engine, so that one that is dropped can be collected."""

    def __init__(self, ensemble: LocalEnsemble) -> None:
        self._ensemble: LocalEnsemble | None = ensemble
        self._broken = False
        for stage in ensemble.stages.values():
            stage.on_fatal = self._on_fatal

    def start(self, call: Call, sink: Sink) -> Handle:
        """Begin a request; see :data:`triptych.client.calls.surface.Open`."""
        if (ensemble := self._ensemble) is None:
            raise TriptychError(ErrorKind.STAGE_DEAD, "the engine is closed")
        if self._broken:
            raise TriptychError(
                ErrorKind.STAGE_DEAD, "nothing more can be computed in this process, its device failed; start another"
            )
        media = next(call.request.media(), None)
        return ensemble.start(call.request, call.media, sink, ensemble=CHAT if media else CHAT_TEXT)

    def close(self) -> None:
        if (ensemble := self._ensemble) is not None:
            self._ensemble = None
            ensemble.close()

    def _on_fatal(self) -> None:
        self._broken = True


def _settings(model: str, options: Mapping[str, Any]) -> Settings:
    """The settings that the arguments ask for; errors name the arguments."""
    known = [f.name for f in fields(Settings) if f.name not in ("model", *_OF_SERVERS)]
    for name in _OF_SERVERS:
        if name in options:
            raise TriptychError(ErrorKind.UNSUPPORTED, f"{name} has no effect in one process; leave it out", name)
    check.known_keys(options, known, "")
    given = {name: json.dumps(v) if isinstance(v, Mapping) else v for name, v in options.items() if v is not None}
    if str(given.get("chat_template", "")).endswith(".jinja"):
        given["chat_template"] = str(Path(given["chat_template"]).expanduser().resolve())
    try:
        return Settings.from_dict({**given, "model": resolve_model(model)})
    except CommandError as error:
        raise invalid(_with_remedy(error), "model") from None
    except TriptychError as error:
        name = (error.param or "").removeprefix("settings.")
        raise invalid(error.message.replace(f"settings.{name}", name), name) from None


def _device(settings: Settings) -> str:
    """The torch device of the stages that use one."""
    try:
        gpu_ids = place(settings).gpu_ids
    except LauncherError as error:
        raise invalid(_with_remedy(error)) from None
    return f"cuda:{gpu_ids[0]}" if gpu_ids else "cpu"


def _with_remedy(error: CommandError | LauncherError) -> str:
    return f"{error.message}; {error.remedy}" if error.remedy else error.message
