"""Composition root of ``language_model``: a family's decoder, the engine, and the tensors between."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..contract.errors import ErrorKind, TriptychError
from ..contract.generate import Renderer
from ..contract.logs import about
from ..contract.settings import Settings
from ..families.base import Decoder
from ..stage import Responder, Stage, Telemetry
from .building import build_runner, context_length
from .engine.config import EngineConfig
from .engine.engine import Engine, Submission
from .inputs import names, read_plan, read_prompt
from .runner.cross import CrossLayout
from .runner.parallel.runner import ParallelRunner
from .runner.rope import RopeSwitch

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 2.0


class LanguageModelStage(Stage):
    """Decoupled stage: prompts with embeddings in, a stream of deltas out."""

    def __init__(self, settings: Settings, telemetry: Telemetry, device: str, decoder: Decoder | None = None) -> None:
        """Load the decoder, make the KV cache, start the engine.

        Args:
            settings, telemetry, device: see :class:`~triptych.python_models.stage.Stage`.
            decoder: instead of the one of ``settings.model``.

        Raises:
            TriptychError: saying which option to change.
        """
        super().__init__(settings, telemetry, device)
        if settings.torch_threads:
            torch.set_num_threads(settings.torch_threads)
        self._runner, decoder, num_blocks = build_runner(settings, device, decoder, self._rank_lost)
        self._num_axes = decoder.num_axes
        self._bidirectional = decoder.bidirectional
        self._token_extras = decoder.token_extras
        self._rope_switch = RopeSwitch.of(decoder.config)
        self._position_step = decoder.position_step
        self._cross = CrossLayout.of(decoder)
        self._hidden_size = int(decoder.config.hidden_size)
        self._vocab_size = int(decoder.config.vocab_size)
        config = EngineConfig(
            num_blocks=num_blocks,
            block_size=settings.block_size,
            context_length=context_length(settings, decoder),
            max_running=self._runner.last_tokens.shape[0],
            max_queued=settings.max_queued_requests,
            max_step_tokens=settings.chunked_prefill_size,
            heartbeat_s=settings.heartbeat_s,
            timeout_s=settings.request_timeout_s,
            eos_token_ids=decoder.eos_token_ids,
            windows=tuple(group.window for group in self._runner.kv_groups),
            overlap=_overlap(settings, device),
            speculative_tokens=settings.speculative_tokens,
            prefix_cache=settings.prefix_cache,
            saved_states=self._runner.saved_states,
            max_media_bytes=settings.max_media_mb * 2**20,
        )
        # on a CPU the steps themselves are the engine's work: it never waits while it is busy
        pauses = self.pauses if torch.device(device).type == "cuda" else None
        self.engine = Engine(
            self._runner, decoder.tokenizer, config, telemetry, device=device, on_fatal=self._end, pauses=pauses
        )

    def submit(self, request_id: str, inputs: Mapping[str, Any], responder: Responder) -> None:
        """See :class:`~triptych.python_models.stage.Stage`."""
        try:
            if cancelled := names(inputs, "cancel"):
                self.cancel(cancelled)
            if renewed := names(inputs, "renew"):
                self.renew(renewed)
            if "input_ids" not in inputs:
                if not self.engine.alive:
                    raise TriptychError(
                        ErrorKind.STAGE_DEAD, "the language model's engine has stopped", None, "language_model"
                    )
                responder.send({}, final=True)
                return
            plan = read_plan(inputs)
            prompt = read_prompt(
                inputs,
                plan,
                self._num_axes,
                self._hidden_size,
                self._vocab_size,
                self._bidirectional,
                self._token_extras,
                self._rope_switch,
                self._position_step,
                self._cross,
            )
            for rows in prompt.rows:
                # the server falls back to host memory without a word when its CUDA pool is full
                self.telemetry.add("triptych_embedding_bytes_total", rows.nbytes, device=rows.device.type)
            if plan.form is not None:
                responder.render(Renderer(plan.form))
            elif not plan.heartbeats:
                responder.render(lambda delta: None if delta.is_heartbeat else delta.to_tensors())
            submission = Submission(
                request_id,
                prompt,
                replace(plan.sampling, stop=(*plan.sampling.stop, *plan.stop)),
                responder,
                plan.stream,
                plan.lease_s,
                plan.timeout_s,
                plan.priority,
                plan.cache_salt,
                plan.times,
                plan.syntax,
                plan.embed,
            )
            self.engine.submit(submission)
        except TriptychError as error:
            self.telemetry.add("triptych_requests_total", outcome=error.kind.value)
            responder.fail(error)
        except Exception as error:
            logger.exception("a request cannot be read", extra=about(request_id))
            self.telemetry.add("triptych_requests_total", outcome=ErrorKind.STAGE_FAILED.value)
            message = f"the language model cannot read this request: {type(error).__name__}: {error}"
            responder.fail(TriptychError(ErrorKind.STAGE_FAILED, message, None, "language_model"))

    def flush(self, responder: Responder) -> None:
        """See :class:`~triptych.python_models.stage.Stage`; only while no request runs or waits."""
        self.engine.flush(responder)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """See :class:`~triptych.python_models.stage.Stage`."""
        self.engine.cancel(request_ids)

    def renew(self, request_ids: Sequence[str]) -> None:
        """See :class:`~triptych.python_models.stage.Stage`."""
        self.engine.renew(request_ids)

    def close(self) -> None:
        """See :class:`~triptych.python_models.stage.Stage`."""
        self.engine.close()
        self._runner.free()
        if isinstance(self._runner, ParallelRunner):
            self._runner.close()

    def _end(self) -> None:
        if self.on_fatal is not None:
            self.on_fatal()

    def _rank_lost(self, error: TriptychError) -> None:
        """End the process soon: its device may wait for ever in a collective for a rank that is gone."""
        logger.critical("%s", error.message)
        if torch.device(self.device).type == "cuda":
            # an engine that is not held by its device ends by itself before that
            threading.Timer(_LAST_WORDS_S, self._give_up, (error,)).start()

    def _give_up(self, error: TriptychError) -> None:
        """Say so to every request and end the process; the server's supervisor has the model loaded again."""
        # a rank may be lost before there is an engine
        if (engine := getattr(self, "engine", None)) is not None:
            engine.abandon(error)
        self._end()
        os._exit(1)


def _overlap(settings: Settings, device: str) -> bool:
    if settings.overlap == "auto":
        return torch.device(device).type == "cuda"
    return settings.overlap == "on"
