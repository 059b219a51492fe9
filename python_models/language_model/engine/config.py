"""The engine's limits."""

from __future__ import annotations

from dataclasses import dataclass

from ...contract.errors import ErrorKind, TriptychError


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits, resolved.

    Attributes:
        num_blocks: KV blocks of each group of layers.
        block_size: tokens in a block.
        context_length: longest prompt and answer together.
        max_running: requests that are computed together.
        max_queued: requests that may wait beside them.
        max_step_tokens: tokens computed in one step; 0 computes every prompt in one piece.
        heartbeat_s: a request that had nothing to say for this long sends an empty delta.
        timeout_s: a request ends after this long.
        eos_token_ids: tokens that end an answer.
        windows: of each group, see :class:`~..runner.step.KVGroup`.
        overlap: queue the next step before the tokens of this one are read.
        speculative_tokens: tokens guessed per step for requests that do not say themselves; 0 is off.
        prefix_cache: keep the blocks of finished requests for prompts that begin alike.
        saved_states: None for a decoder that keeps nothing but keys and values; for one with recurrent layers, states
            that can be saved for prompts that begin alike (see :mod:`.snapshots`).
        max_media_bytes: media rows that requests in flight may hold.
        log_s: lines about prefill and decode batches come this often.
    """

    num_blocks: tuple[int, ...]
    block_size: int
    context_length: int
    max_running: int
    max_queued: int
    max_step_tokens: int
    heartbeat_s: float
    timeout_s: float
    eos_token_ids: frozenset[int]
    windows: tuple[int | None, ...] = (None,)
    overlap: bool = False
    speculative_tokens: int = 0
    prefix_cache: bool = True
    saved_states: int | None = None
    max_media_bytes: int = 2**32
    log_s: float = 5.0

    def __post_init__(self) -> None:
        """Refuse pools in which a single request could get stuck.

        Raises:
            ValueError: naming the numbers.
        """
        if len(self.num_blocks) != len(self.windows):
            raise ValueError(f"{len(self.num_blocks)} pools of blocks for {len(self.windows)} groups of layers")
        for count, window in zip(self.num_blocks, self.windows, strict=True):
            if window is not None and count < self.blocks_of_span(window, 1):
                raise ValueError(
                    f"{count} blocks of {self.block_size} tokens are too few for a window of {window}: "
                    f"{self.blocks_of_span(window, 1)} are needed"
                )

    @property
    def kv_tokens(self) -> int:
        """Tokens of one request that the KV cache can hold; windows hold any number."""
        full = [n for n, window in zip(self.num_blocks, self.windows, strict=True) if window is None]
        return min(full) * self.block_size if full else self.context_length

    @property
    def max_length(self) -> int:
        """Longest prompt and answer that one request can have here."""
        # the token sampled last is never computed, so it takes no room
        return min(self.context_length, self.kv_tokens + 1)

    def blocks_of_span(self, window: int, span: int) -> int:
        """Blocks of a group with this window that the computation of ``span`` tokens in one piece needs."""
        longest = max(self.max_length - 1, 1)
        tokens = min(window - 1 + span, longest)
        # it may begin anywhere in a block
        return min((tokens - 2) // self.block_size + 2, -(-longest // self.block_size)) if tokens > 1 else 1

    def check_span(self, span: int) -> None:
        """Refuse a prompt with an uncuttable piece of ``span`` tokens that can never be computed.

        Raises:
            TriptychError: CONTEXT_LENGTH_EXCEEDED, naming the numbers.
        """
        for count, window in zip(self.num_blocks, self.windows, strict=True):
            if window is not None and self.blocks_of_span(window, span) > count:
                raise TriptychError(
                    ErrorKind.CONTEXT_LENGTH_EXCEEDED,
                    f"a piece of media of {span} tokens can never fit into the KV cache of layers with a window of "
                    f"{window}, which has {count * self.block_size} tokens",
                    "messages",
                )

    def max_tokens(self, length: int, wanted: int | None) -> int:
        """Tokens that a request may generate.

        Args:
            length: tokens of its prompt.
            wanted: ``max_tokens`` of the request.

        Raises:
            TriptychError: CONTEXT_LENGTH_EXCEEDED or INVALID_REQUEST, naming the numbers.
        """
        if length < 1:
            raise TriptychError(ErrorKind.INVALID_REQUEST, "the prompt is empty", "messages")
        if length >= self.context_length:
            raise TriptychError(
                ErrorKind.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {length} tokens, media included, but the context length is {self.context_length} "
                "tokens for prompt and answer together",
                "messages",
            )
        if wanted is not None and length + wanted > self.context_length:
            raise TriptychError(
                ErrorKind.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {length} tokens and max_tokens is {wanted}, together {length + wanted}, but the "
                f"context length is {self.context_length} tokens; max_tokens may be {self.context_length - length}",
                "max_tokens",
            )
        room = self.max_length - length
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f" and max_tokens {wanted}"
            raise TriptychError(
                ErrorKind.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt's {length} tokens{asked} can never fit into the KV cache of {self.kv_tokens} tokens; "
                "ask for less, or start the server with a larger kv_cache_tokens",
                "messages" if room < 1 else "max_tokens",
            )
        return room if wanted is None else wanted
