"""What enters the engine: a submission is checked and becomes the requests of its choices, on the caller's thread."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ...contract.answer import Syntax
from ...contract.errors import ErrorKind, TriptychError
from ...contract.sampling import SamplingParams
from ...contract.timings import PreprocessTimes
from ...stage import Responder
from .config import EngineConfig
from .delivery import Answer, Delivery
from .request import Prompt, Request, draw_seed, seed_of_choice
from .sampler import SamplerState
from .speculation import PromptLookup


@dataclass(frozen=True)
class Submission:
    """A request as it enters the engine.

    Attributes:
        request_id: by which it is cancelled and renewed.
        prompt: what the model reads.
        sampling: how it answers, and how often.
        responder: where all answers go.
        stream: a delta for each token instead of one for each choice.
        lease_s: it ends when not renewed for this long; None for no lease.
        timeout_s: it ends after this long; None takes the engine's.
        priority: higher ones are served first.
        cache_salt: it shares the prefix cache only with requests of the same.
        before: when the stage that made the prompt did what.
        syntax: what the answer is written in.
        embed: the hidden state of the prompt's last token is wanted instead of an answer.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    responder: Responder
    stream: bool = True
    lease_s: float | None = None
    timeout_s: float | None = None
    priority: int = 0
    cache_salt: str = ""
    before: PreprocessTimes | None = None
    syntax: Syntax | None = None
    embed: bool = False


class Admission:
    """Makes answers of submissions. Thread-safe."""

    def __init__(self, config: EngineConfig, vocab_size: int, delivery: Delivery) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._delivery = delivery

    def answer(self, submission: Submission, now: float) -> Answer:
        """Check against the limits. Args: ``now`` of the engine's clock.

        Raises:
            TriptychError: CONTEXT_LENGTH_EXCEEDED, INVALID_REQUEST or TOO_LARGE.
        """
        config, params, prompt = self._config, submission.sampling, submission.prompt
        max_tokens = config.max_tokens(len(prompt), 1 if submission.embed else params.max_tokens)
        for start, end in prompt.spans:
            config.check_span(end - start)
        vocab_size = self._vocab_size
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise TriptychError(
                        ErrorKind.INVALID_REQUEST,
                        f"{name} names token {token_id}, but the vocabulary has {vocab_size} tokens",
                        name,
                    )
        if prompt.media_bytes > config.max_media_bytes:
            raise TriptychError(
                ErrorKind.TOO_LARGE,
                f"the request's media take {prompt.media_bytes / 2**20:.1f} MiB of embeddings, but all requests "
                f"together may have {config.max_media_bytes / 2**20:g} (max_media_mb)",
                "messages",
            )
        answer = Answer(
            request_id=submission.request_id,
            prompt=prompt,
            sampling=params,
            responder=submission.responder,
            stream=submission.stream,
            lease_s=submission.lease_s,
            timeout_s=min(config.timeout_s, submission.timeout_s or config.timeout_s),
            arrival=now,
            renewed=now,
            last_sent=now,
            unix_arrival=time.time(),
            before=submission.before,
            syntax=submission.syntax,
        )
        seed = draw_seed() if params.seed is None else params.seed
        # without a prefix cache the choices of one prompt still share it, among themselves
        shared = config.prefix_cache or params.n > 1
        salt = submission.cache_salt if config.prefix_cache else f"{draw_seed()}"
        for index in range(params.n):
            own_seed = seed_of_choice(seed, index)
            sampler = SamplerState(params, prompt.token_ids, own_seed, self.stop_ids(params), vocab_size)
            request = Request(
                submission.request_id,
                prompt,
                max_tokens,
                config.block_size,
                len(config.num_blocks),
                priority=submission.priority,
                index=index,
                salt=salt,
                cacheable=shared,
                sampler=sampler,
                choice=self._delivery.choice(answer),
                embed=submission.embed,
            )
            guesses = config.speculative_tokens if params.speculative_tokens is None else params.speculative_tokens
            if guesses and config.saved_states is not None:
                raise TriptychError(
                    ErrorKind.INVALID_REQUEST,
                    f"speculative_tokens is {guesses}, but this model has recurrent layers, whose state cannot be "
                    "taken back from a wrong guess; it must be 0",
                    "speculative_tokens",
                )
            if guesses and params.grammar is None and not submission.embed and not sampler.needs_history:
                request.speculative_tokens = guesses
                request.speculation = PromptLookup(prompt.token_ids.tolist(), guesses, vocab_size)
            if shared:
                # here rather than on the engine's thread
                request.keys = list(answer.choices[0].keys if index else request.block_keys(len(prompt)))
            answer.choices.append(request)
        answer.num_open = params.n
        return answer

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end an answer, whether or not they are suppressed or ignored."""
        return frozenset(params.stop_token_ids) | self._config.eos_token_ids
