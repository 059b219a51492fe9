"""From settings to a runner: on one device, or shared by the ranks of a tensor-parallel group."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch

from ..contract.errors import ErrorKind, TriptychError, invalid
from ..contract.settings import Settings
from ..families.base import Decoder
from ..families.checkpoint import find_checkpoint
from ..families.loading import stage_dtype
from ..families.registry import load_family
from .runner import fused
from .runner.cross import CrossLayout
from .runner.executor import Executor, make_executor, token_axes
from .runner.memory import device_memory
from .runner.options import RunnerOptions
from .runner.parallel.member import Member, Recipe
from .runner.parallel.runner import ParallelRunner
from .runner.runner import DecoderRunner
from .sizing import kv_blocks, state_slots

logger = logging.getLogger(__name__)

_LONGEST_REHEARSED = 4096

AnyRunner = DecoderRunner | ParallelRunner


def build_runner(
    settings: Settings,
    device: str,
    decoder: Decoder | None = None,
    on_fault: Callable[[TriptychError], None] | None = None,
) -> tuple[AnyRunner, Decoder, tuple[int, ...]]:
    """Load the decoder, make the KV cache, capture the decode steps.

    Args:
        settings: of the deployment.
        device: torch device; of rank 0, where there are several.
        decoder: instead of the one of ``settings.model``.
        on_fault: called when a rank is lost, from any thread.

    Returns:
        The runner, its decoder (without weights where ranks share them) and the blocks of each of its groups.

    Raises:
        TriptychError: saying which option to change.
    """
    # kernels go to the current device
    with torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext():
        return _build(settings, device, decoder, on_fault)


def _build(
    settings: Settings, device: str, decoder: Decoder | None, on_fault: Callable[[TriptychError], None] | None
) -> tuple[AnyRunner, Decoder, tuple[int, ...]]:
    runner: AnyRunner
    memory: tuple[int, int] | None
    if settings.tp > 1:
        runner, decoder = _parallel(settings, device, on_fault)
        memory = runner.memory()
    else:
        if decoder is None:
            dtype = stage_dtype(find_checkpoint(settings), settings, device)
            decoder = load_family(settings).load_decoder(device, dtype)
        runner = _on_device(settings, decoder, make_executor(decoder, settings.decoder_backend), device)
        memory = _beside_media(settings, decoder, device)
    length = context_length(settings, decoder)
    num_blocks = kv_blocks(settings, runner.kv_groups, runner.bytes_per_token, length, device, memory)
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
    runner.warm_up(min(settings.chunked_prefill_size or _LONGEST_REHEARSED, length))
    return runner, decoder, num_blocks


def _beside_media(settings: Settings, decoder: Decoder, device: str) -> tuple[int, int] | None:
    """Free and total bytes of a GPU where what cross-attention layers keep of media needs room beside the KV cache."""
    if CrossLayout.of(decoder) is None or torch.device(device).type != "cuda":
        return None
    free, total = device_memory(device)
    return max(free - settings.max_media_mb * 2**20, 0), total


def build_rank(member: Member, settings: str) -> DecoderRunner:
    """One rank's part of the decoder, see :class:`~.runner.parallel.member.Recipe`; ``settings`` is their JSON."""
    options = Settings.from_json(settings)
    if options.torch_threads:
        torch.set_num_threads(options.torch_threads)
    dtype = stage_dtype(find_checkpoint(options), options, member.device)
    decoder, source = load_family(options).open_decoder(member.device, dtype, progress=member.rank == 0)
    shard = fused.Shard(member.rank, member.size, member.expert_parallel)
    built = fused.build(decoder, shard, member.collectives, source)
    source.close()
    if isinstance(built, str):
        raise TriptychError(
            ErrorKind.UNSUPPORTED,
            f"tp {member.size} is not possible with {type(decoder.text_model).__name__}: {built}",
            "settings.tp",
            "language_model",
        )
    return _on_device(options, decoder, built, member.device)


def context_length(settings: Settings, decoder: Decoder) -> int:
    """Tokens of the longest request.

    Raises:
        TriptychError: more than the checkpoint was made for.
    """
    if settings.context_length > decoder.context_length:
        raise TriptychError(
            ErrorKind.INVALID_REQUEST,
            f"context_length {settings.context_length} is more than the {decoder.context_length} positions the "
            "checkpoint was made for",
            "settings.context_length",
        )
    return settings.context_length or decoder.context_length


def _on_device(settings: Settings, decoder: Decoder, executor: Executor, device: str) -> DecoderRunner:
    length, spans = context_length(settings, decoder), bool(decoder.bidirectional)
    options = RunnerOptions.of(settings, length, device, spans=spans)
    slots = settings.max_running_requests
    if executor.states:
        if settings.speculative_tokens:
            raise invalid(
                "this model has recurrent layers, whose state cannot be taken back from a wrong guess: "
                f"speculative_tokens must be 0, not {settings.speculative_tokens}",
                "settings.speculative_tokens",
            )
        slots, saved = state_slots(settings)
        options = replace(options, saved_states=saved)
    return DecoderRunner(executor, token_axes(decoder), settings.block_size, device, options, slots)


def _parallel(
    settings: Settings, device: str, on_fault: Callable[[TriptychError], None] | None
) -> tuple[ParallelRunner, Decoder]:
    if settings.decoder_backend == "transformers":
        raise invalid("tp needs fused layers, but decoder_backend is transformers", "settings.decoder_backend")
    if settings.ep not in (1, settings.tp):
        raise invalid(f"ep must be 1 or tp ({settings.tp}), not {settings.ep}", "settings.ep")
    place = torch.device(device)
    devices = [device] * settings.tp
    if place.type == "cuda":
        first, found = place.index or 0, torch.cuda.device_count()
        if first + settings.tp > found:
            raise invalid(f"tp {settings.tp} from {device} on needs more than the {found} GPUs here", "settings.tp")
        devices = [f"cuda:{first + rank}" for rank in range(settings.tp)]
    dtype = stage_dtype(find_checkpoint(settings), settings, device)
    recipe = Recipe(
        f"{__name__}:{build_rank.__name__}",
        {"settings": settings.to_json()},
        expert_parallel=settings.ep > 1,
        dtype=str(dtype).removeprefix("torch."),
    )
    # the ranks read the weights; here only configuration and tokenizer are wanted
    decoder, source = load_family(settings).open_decoder(device, dtype, progress=False)
    source.close()
    return ParallelRunner(recipe, devices, on_fault), decoder
