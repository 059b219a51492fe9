"""From sampled tokens to what the client hears: text, ends, log probabilities, usage."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...contract.answer import Syntax
from ...contract.delta import Delta, TokenLogprob, Usage
from ...contract.errors import TriptychError
from ...contract.logs import about
from ...contract.sampling import SamplingParams
from ...contract.timings import PreprocessTimes, Timings
from ...stage import Responder, Telemetry
from .detokenizer import Detokenizer, Tokenizer, Vocabulary
from .reasoning import ReasoningCount
from .request import Prompt, Request
from .sampler import Sampled

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Answer:
    """What the choices of one submission share.

    Attributes:
        request_id, prompt, sampling, responder, stream, lease_s: as submitted.
        timeout_s: it ends after this long.
        arrival, renewed, last_sent: times of the engine's clock.
        unix_arrival: ``arrival`` as Unix time.
        before: of the stage that made the prompt.
        syntax: what its text is written in, where it may hold calls or reasoning.
        first_token: when the first choice's came.
        choices: a request for each choice.
        num_open: choices that have not ended.
        done: its last answer is out.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    responder: Responder
    stream: bool
    lease_s: float | None
    timeout_s: float
    arrival: float
    renewed: float
    last_sent: float
    unix_arrival: float
    before: PreprocessTimes | None = None
    syntax: Syntax | None = None
    first_token: float = 0.0
    choices: list[Request] = field(default_factory=list)
    num_open: int = 0
    done: bool = False

    def usage(self) -> Usage:
        """Token counts of all choices so far; the prompt counts once."""
        rows = {"image": 0, "video": 0, "audio": 0}
        for item in self.prompt.items:
            rows[item.modality] += item.num_tokens
        return Usage(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.choices[0].num_cached,
            completion_tokens=sum(r.choice.num_output for r in self.choices if r.choice is not None),
            image_tokens=rows["image"],
            video_tokens=rows["video"],
            audio_tokens=rows["audio"],
            reasoning_tokens=sum(r.choice.reasoning.tokens for r in self.choices if r.choice and r.choice.reasoning),
        )

    @property
    def began(self) -> float:
        """Arrival at the first stage, by the engine's clock."""
        return self.arrival if self.before is None else self.arrival - (self.unix_arrival - self.before.arrival)

    def timings(self, now: float) -> Timings:
        """Where its time went, at the end; ``now`` of the engine's clock."""
        offset = self.unix_arrival - self.arrival
        admitted = self.choices[0].admitted
        assert admitted is not None
        return Timings(self.before, self.unix_arrival, admitted + offset, self.first_token + offset, now + offset)

    def deliver(self, content: Delta | TriptychError, final: bool = False) -> bool:
        """Hand something to the responder; False where that raised."""
        try:
            if isinstance(content, TriptychError):
                self.responder.fail(content)
            else:
                self.responder.send(content, final=final)
        except Exception:
            logger.exception("a responder failed", extra=about(self.request_id))
            return False
        return True


@dataclass(eq=False, slots=True)
class Choice:
    """What one choice has said.

    Attributes:
        answer: that it belongs to.
        detokenizer: of its text.
        num_output: tokens it gave; those computed behind its end do not count.
        last_token: time of the newest.
        text, logprobs: kept where nothing is streamed.
        ended: it has its finish reason.
        reasoning: counts its tokens, where it is set apart.
    """

    answer: Answer
    detokenizer: Detokenizer
    num_output: int = 0
    last_token: float = 0.0
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ended: bool = False
    reasoning: ReasoningCount | None = None


class Delivery:
    """Makes deltas of tokens."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int], telemetry: Telemetry) -> None:
        self._vocabulary = Vocabulary(tokenizer)
        self._eos_token_ids = eos_token_ids
        self._telemetry = telemetry
        self._generated = 0

    def choice(self, answer: Answer) -> Choice:
        """A new choice of an answer."""
        syntax = answer.syntax
        if syntax is None:
            return Choice(answer, Detokenizer(self._vocabulary, answer.sampling))
        count = None if syntax.marks is None else ReasoningCount(syntax.marks, syntax.reasons)
        return Choice(answer, Detokenizer(self._vocabulary, answer.sampling, syntax.tokens), reasoning=count)

    def take(self, request: Request, choice: Choice, sampled: Sequence[Sampled], now: float) -> Delta | None:
        """Take new tokens; what there is to say, if anything. Tokens behind an end are dropped.

        Raises:
            ValueError: a token does not fit the request's grammar.
        """
        answer = choice.answer
        if request.embed:
            return self._embedding(request, choice, now)
        ids: list[int] = []
        text = finish = ""
        matched: str | int | None = None
        logprobs: list[TokenLogprob] = []
        for one in sampled:
            ids.append(one.token_id)
            choice.num_output += 1
            request.sampler.accept(one.token_id)
            if one.logprob is not None:
                logprobs.append(self._token_logprob(one, one.logprob))
            finish, matched, piece = self._advance(request, choice, one.token_id)
            text += piece
            if finish:
                choice.ended = True
                break
        self._measure(request, choice, len(ids), finish, now)
        timings = answer.timings(now) if finish and answer.num_open == 1 else None
        if answer.stream:
            usage = answer.usage() if finish else None
            return Delta(text, tuple(ids), tuple(logprobs), finish, matched, usage, request.index, timings)
        choice.text.append(text)
        choice.logprobs.extend(logprobs)
        if not finish:
            return None
        whole = tuple(request.output_ids[: choice.num_output])
        known = tuple(choice.logprobs)
        return Delta("".join(choice.text), whole, known, finish, matched, answer.usage(), request.index, timings)

    def _embedding(self, request: Request, choice: Choice, now: float) -> Delta:
        """The whole answer of a request for an embedding."""
        assert request.hidden is not None
        vector = request.hidden.float()
        vector = vector / vector.norm()
        choice.ended = True
        self._measure(request, choice, 0, "stop", now)
        answer = choice.answer
        return Delta(
            finish_reason="stop",
            usage=answer.usage(),
            timings=answer.timings(now),
            embedding=vector.cpu().numpy().tobytes(),
        )

    def flush(self) -> None:
        """Report what was counted since the last time."""
        if self._generated:
            self._telemetry.add("triptych_generation_tokens_total", self._generated)
            self._generated = 0

    def _advance(self, request: Request, choice: Choice, token_id: int) -> tuple[str, str | int | None, str]:
        """Finish reason, what matched, and new text after a token; that of a token that ends the answer is left out."""
        params = choice.answer.sampling
        # before min_tokens the sampler does not choose such a token
        if token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos):
            return "stop", token_id, choice.detokenizer.finish()
        piece = choice.detokenizer.add(token_id)
        if choice.reasoning is not None:
            choice.reasoning.add(piece.text)
        if piece.matched_stop is not None:
            return "stop", piece.matched_stop, piece.text
        grammar = request.sampler.grammar
        if grammar is not None and grammar.finished:
            return "stop", None, piece.text + choice.detokenizer.finish()
        if choice.num_output >= request.max_tokens:
            return "length", None, piece.text + choice.detokenizer.finish()
        return "", None, piece.text

    def _token_logprob(self, sampled: Sampled, logprob: float) -> TokenLogprob:
        names = self._vocabulary
        top = tuple((i, names.text(i), value, names.data(i)) for i, value in sampled.top)
        token_id = sampled.token_id
        return TokenLogprob(token_id, names.text(token_id), logprob, names.data(token_id), top, sampled.rank)

    def _measure(self, request: Request, choice: Choice, count: int, finish: str, now: float) -> None:
        telemetry, answer = self._telemetry, choice.answer
        if choice.num_output > count:
            gap = (now - choice.last_token) / count
            for _ in range(count):
                telemetry.observe("triptych_inter_token_seconds", gap)
        elif request.index == 0:
            answer.first_token = now
            usage = answer.usage()
            kinds = {"image": usage.image_tokens, "video": usage.video_tokens, "audio": usage.audio_tokens}
            kinds["text"] = usage.prompt_tokens - sum(kinds.values())
            for kind, number in kinds.items():
                if number:
                    telemetry.add("triptych_prompt_tokens_total", number, kind=kind)
            if request.num_cached:
                telemetry.add("triptych_cached_tokens_total", request.num_cached)
            admitted = answer.arrival if request.admitted is None else request.admitted
            telemetry.observe("triptych_queue_seconds", admitted - answer.arrival)
            telemetry.observe("triptych_prefill_seconds", now - admitted)
            telemetry.observe("triptych_time_to_first_token_seconds", now - answer.began)
        if choice.ended:
            telemetry.add("triptych_answers_total", finish_reason=finish)
            telemetry.observe("triptych_request_generation_tokens", choice.num_output)
            if answer.num_open == 1:
                telemetry.observe("triptych_request_prompt_tokens", request.num_prompt)
                telemetry.observe("triptych_request_seconds", now - answer.began)
        self._generated += count
        choice.last_token = now
