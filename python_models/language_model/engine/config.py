"""The engine's limits."""

from __future__ import annotations

from dataclasses import dataclass

from ...contract.errors import ErrorKind, TriptychError


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits, resolved.

    Attributes:
        num_blocks, block_size: the KV cache: blocks, and tokens in each.
        context_length: longest prompt and answer together.
        max_running: requests that are computed together.
        max_queued: requests that may wait beside them.
        max_step_tokens: tokens computed in one step.
        heartbeat_s: a request that had nothing to say for this long sends an empty delta.
        timeout_s: a request ends after this long.
        eos_token_ids: tokens that end an answer.
    """

    num_blocks: int
    block_size: int
    context_length: int
    max_running: int
    max_queued: int
    max_step_tokens: int
    heartbeat_s: float
    timeout_s: float
    eos_token_ids: frozenset[int]

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size

    @property
    def max_length(self) -> int:
        """Longest prompt and answer that one request can have here."""
        # the token sampled last is never computed, so it takes no room
        return min(self.context_length, self.kv_tokens + 1)

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
