"""Composition root of ``language_model``: a family's decoder, the engine, and the tensors between."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..contract.errors import ErrorKind, TriptychError
from ..contract.settings import Settings
from ..families.base import Decoder
from ..families.checkpoint import find_checkpoint
from ..families.loading import stage_dtype
from ..families.registry import load_family
from ..stage import Responder, Stage, Telemetry
from .engine.config import EngineConfig
from .engine.engine import Engine, Submission
from .inputs import names, read_plan, read_prompt
from .runner.executor import make_executor
from .runner.options import RunnerOptions
from .runner.runner import DecoderRunner
from .sizing import kv_blocks

logger = logging.getLogger(__name__)


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
        if decoder is None:
            dtype = stage_dtype(find_checkpoint(settings), settings, device)
            decoder = load_family(settings).load_decoder(device, dtype)
        self._num_axes = decoder.num_axes
        context_length = _context_length(settings, decoder)
        executor = make_executor(decoder, "transformers")
        options = RunnerOptions.of(settings, context_length, device)
        self._runner = runner = DecoderRunner(
            executor, decoder.num_axes, settings.block_size, device, options, settings.max_running_requests
        )
        num_blocks = kv_blocks(settings, runner.kv_groups, runner.bytes_per_token, context_length, device)
        runner.allocate(num_blocks)
        for group, blocks, width in zip(runner.kv_groups, num_blocks, runner.bytes_per_token, strict=True):
            logger.info(
                "KV cache: %d tokens in blocks of %d, %.0f MiB on %s, %s",
                blocks * settings.block_size,
                settings.block_size,
                blocks * settings.block_size * width / 2**20,
                device,
                "of every request" if group.window is None else f"in windows of {group.window}",
            )
        runner.warm_up(settings.chunked_prefill_size)
        self._hidden_size = int(decoder.config.hidden_size)
        self._vocab_size = int(decoder.config.vocab_size)
        config = EngineConfig(
            num_blocks=num_blocks[0],
            block_size=settings.block_size,
            context_length=context_length,
            max_running=settings.max_running_requests,
            max_queued=settings.max_queued_requests,
            max_step_tokens=settings.chunked_prefill_size,
            heartbeat_s=settings.heartbeat_s,
            timeout_s=settings.request_timeout_s,
            eos_token_ids=decoder.eos_token_ids,
        )
        self.engine = Engine(runner, decoder.tokenizer, config, telemetry, device=device)

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
            prompt = read_prompt(inputs, plan, self._num_axes, self._hidden_size, self._vocab_size)
            for media in prompt.media:
                # the server falls back to host memory without a word when its CUDA pool is full
                self.telemetry.add("triptych_embedding_bytes_total", media.rows.nbytes, device=media.rows.device.type)
            submission = Submission(
                request_id, prompt, plan.sampling, responder, plan.stream, plan.lease_s, plan.timeout_s
            )
            self.engine.submit(submission)
        except TriptychError as error:
            self.telemetry.add("triptych_requests_total", outcome=error.kind.value)
            responder.fail(error)
        except Exception as error:
            logger.exception("request %r cannot be read", request_id)
            self.telemetry.add("triptych_requests_total", outcome=ErrorKind.STAGE_FAILED.value)
            message = f"the language model cannot read this request: {type(error).__name__}: {error}"
            responder.fail(TriptychError(ErrorKind.STAGE_FAILED, message, None, "language_model"))

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


def _context_length(settings: Settings, decoder: Decoder) -> int:
    if settings.context_length > decoder.context_length:
        raise TriptychError(
            ErrorKind.INVALID_REQUEST,
            f"context_length {settings.context_length} is more than the {decoder.context_length} positions the "
            "checkpoint was made for",
            "settings.context_length",
        )
    return settings.context_length or decoder.context_length
