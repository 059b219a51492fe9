"""Decoders that are special: attention to media (Llama 3.2 Vision), shared keys and values and
embeddings for every layer (Gemma 3n), an adapter for each request (Phi-4-multimodal).

Every way of running gives the tokens of transformers' ``generate``. On a GPU decode steps are CUDA graphs; on a CPU
they are padded in the same way.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.language_model.runner.executor import make_executor
from triptych.python_models.language_model.runner.options import RunnerOptions
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.stage import NoTelemetry

NEW_TOKENS = 14
BLOCK = 4
FAMILIES = ("mllama", "gemma3n", "phi4_multimodal")
WAYS = [(7, 0), (7, 16), (0, 3)]
"""Tokens of a step, the largest batch whose decode steps are replayed."""


class Server:
    """A language model, and the encoders' rows for it."""

    def __init__(self, parts: Any, answer: Callable[[], Any], device: str, **options: Any) -> None:
        values = {"model": str(parts.folder), "kv_cache_tokens": 8192, "block_size": BLOCK, "heartbeat_s": 1000.0}
        self.parts = parts
        self.answer = answer
        self.counts: Counter[str] = Counter()
        self.stage = LanguageModelStage(Settings(**(values | options)), Counting(self.counts), device)
        self.replayed: list[Any] = []
        self.slices: list[Any] = []
        runner = self.stage._runner
        forward = runner.forward

        def watched(slices: Sequence[Any]) -> torch.Tensor:
            self.slices.extend((weakref.ref(part.cross) if part.cross else None, len(part)) for part in slices)
            logits: torch.Tensor = forward(slices)
            return logits

        runner.forward = watched
        if getattr(runner, "_graphs", None) is not None:
            replay = runner._graphs.forward

            def counted(host: Any) -> torch.Tensor:
                self.replayed += [part.cross is not None for part in host.slices]
                logits: torch.Tensor = replay(host)
                return logits

            runner._graphs.forward = counted

    def start(self, chat: Any, **sampling: Any) -> Any:
        prepared = self.parts.prepare(chat)
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": NEW_TOKENS, **sampling})
        plan = Plan(prepared.items, params, prepared.rope_delta, extras=prepared.extras)
        rows = self.parts.encode(prepared)
        inputs = {
            "input_ids": prepared.input_ids,
            "position_ids": prepared.position_ids,
            "plan": [plan.to_json().encode()],
            **{f"{name}_embeddings": tensor.to(self.stage.device) for name, tensor in rows.items()},
        }
        answer = self.answer()
        self.stage.submit("", inputs, answer)
        return answer

    def together(self, chats: Sequence[Any]) -> list[Any]:
        """Start requests; none is computed before all are there."""
        there = threading.Event()
        self.stage.engine._post(there.wait)
        answers = [self.start(chat) for chat in chats]
        there.set()
        return answers

    def close(self) -> None:
        self.stage.close()
        self.stage.engine.check()


class Counting(NoTelemetry):
    def __init__(self, totals: Counter[str]) -> None:
        self.totals = totals

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self.totals[name] += int(value)


class Reference:
    """transformers' answers, each computed once."""

    def __init__(self) -> None:
        self._known: dict[Any, list[int]] = {}

    def __call__(self, parts: Any, chat: Any) -> list[int]:
        key = (parts.folder, chat.messages, tuple(medium.digest for medium in chat.media))
        if key not in self._known:
            self._known[key] = parts.reference_tokens(chat, NEW_TOKENS)
        return self._known[key]


def tokens(answer: Any, index: int = 0) -> list[int]:
    return [token for delta in answer.result() if delta.index == index for token in delta.token_ids]


def cached(answer: Any) -> int:
    return int(answer.result()[-1].usage.cached_tokens)


def medium(parts: Any, seed: int) -> Any:
    return parts.make.image(seed) if "image" in parts.modalities else parts.make.audio(seed)


def chats_of(parts: Any) -> list[Any]:
    """With media and without; of families with sounds also with those alone and beside pictures."""
    make = parts.make
    chats = [
        make.chat("hello world, what is shown here? the quick brown fox jumps over the lazy dog."),
        make.chat(medium(parts, 1), "describe this in detail please!"),
        make.chat("How many objects are there in ", medium(parts, 2), medium(parts, 3), " and which numbers? 0123"),
        make.turns(
            ("user", "what is this? ", medium(parts, 4)),
            ("assistant", "the lazy dog"),
            ("user", "and which colours do they have?"),
        ),
        make.chat("hi"),
    ]
    if len(parts.modalities) > 1:
        chats.append(make.chat(make.audio(5), "transcribe the audio"))
        chats.append(make.chat(make.audio(6), make.image(6, 90, 33), "what is the connection?"))
    return chats


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def parts_of(make_parts: Callable[[str], Any], pytestconfig: pytest.Config) -> Callable[[str], Any]:
    known: dict[str, Any] = {}

    def find(name: str) -> Any:
        if name.startswith("phi4") and not pytestconfig.getoption("--families"):
            pytest.skip("its long prompts are part of make parity")
        if name not in known:
            known[name] = make_parts(name)
        return known[name]

    return find


@pytest.fixture(scope="module")
def expected() -> Reference:
    return Reference()


@pytest.fixture
def serve(
    device: str, new_answer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Server]]:
    """Makes servers; ``graphs`` is the largest batch whose decode steps are replayed, 0 for none."""
    made: list[Server] = []

    def make(parts: Any, graphs: int = 0, **options: Any) -> Server:
        plain = RunnerOptions.of.__func__  # type: ignore[attr-defined]
        monkeypatch.setattr(
            RunnerOptions,
            "of",
            classmethod(lambda cls, *a, **k: dataclasses.replace(plain(cls, *a, **k), graph_batch=graphs)),
        )
        made.append(Server(parts, new_answer, device, **options))
        monkeypatch.undo()
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_checkpoint_can_tell(parts_of: Callable[[str], Any], expected: Reference, name: str) -> None:
    """Another medium gives another answer, as does what is special about the decoder."""
    parts = parts_of(name)
    make = parts.make
    answers = [expected(parts, make.chat("look: ", medium(parts, seed), "describe this")) for seed in (7, 8)]
    assert answers[0] != answers[1]
    assert all(len(set(answer)) > 3 for answer in answers)
    if name.startswith("phi4"):
        inputs = parts.reference_inputs(make.chat("look: ", medium(parts, 7), "describe this"))
        plain = parts.whole._models[""].generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert plain[0, inputs["input_ids"].shape[1] :].tolist() != answers[0]
    with pytest.raises(TriptychError) as caught:
        make_executor(parts.decoder, "fused")
    assert caught.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize(
    ("name", "chunk", "graphs"), [(name, *way) for name in FAMILIES for way in WAYS] + [("phi4mm", *WAYS[1])]
)
def test_the_tokens_of_generate(
    parts_of: Callable[[str], Any],
    expected: Reference,
    serve: Callable[..., Server],
    name: str,
    chunk: int,
    graphs: int,
) -> None:
    parts = parts_of(name)
    options = {"chunked_prefill_size": chunk, "overlap": "on" if graphs else "off", "max_running_requests": 16}
    server = serve(parts, graphs, **options)
    chats = chats_of(parts)
    # side by side, then one after the other with what the cache kept
    answers = server.together(chats)
    assert [tokens(answer) for answer in answers] == [expected(parts, chat) for chat in chats]
    for chat in chats:
        answer = server.start(chat)
        assert tokens(answer) == expected(parts, chat)
        assert cached(answer) > len(parts.prepare(chat).input_ids) - 2 * BLOCK
    assert bool(server.replayed) == bool(graphs)
    # steps that look at media are not replayed
    assert not any(server.replayed)
    if chunk:
        assert max(length for _, length in server.slices) <= chunk


def shared(parts: Any, one: Any, other: Any) -> int:
    """Tokens of whole blocks with which two prompts begin alike, as if all media were the same."""
    ids = [parts.prepare(chat).input_ids for chat in (one, other)]
    length = min(map(len, ids))
    differ = np.flatnonzero(ids[0][:length] != ids[1][:length])
    return int(differ[0] if len(differ) else length) // BLOCK * BLOCK


@pytest.mark.parametrize(("chunk", "graphs"), WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_another_question_about_the_same_medium_shares_it(
    parts_of: Callable[[str], Any],
    expected: Reference,
    serve: Callable[..., Server],
    name: str,
    chunk: int,
    graphs: int,
) -> None:
    parts = parts_of(name)
    server = serve(parts, graphs, chunked_prefill_size=chunk, max_running_requests=16)
    chats = [parts.make.chat("look: ", medium(parts, 7), q) for q in ("which colours?", "how many objects?")]
    answers = []
    for chat in chats:
        answers.append(server.start(chat))
        assert tokens(answers[-1]) == expected(parts, chat)
    assert cached(answers[0]) == 0
    assert cached(answers[1]) == shared(parts, *chats) > parts.prepare(chats[0]).items[0].spans[-1][1] - BLOCK


@pytest.mark.parametrize("name", FAMILIES)
def test_what_stands_before_another_medium(
    parts_of: Callable[[str], Any], expected: Reference, serve: Callable[..., Server], name: str
) -> None:
    """It is shared, but where it attends to the medium that follows, or takes another adapter."""
    parts = parts_of(name)
    make = parts.make
    server = serve(parts, chunked_prefill_size=7, max_running_requests=16)
    text = "what is shown here, and which colours do they have? "
    chats = [
        make.chat(text, medium(parts, 7)),
        make.chat(text, medium(parts, 8)),
        make.chat(text + "look"),
        make.chat(text),
    ]
    answers = []
    for chat in chats:
        answers.append(server.start(chat))
        assert tokens(answers[-1]) == expected(parts, chat)
    found = [cached(answer) for answer in answers]
    before = shared(parts, chats[0], chats[2])
    assert before > 2 * BLOCK
    # that of pictures alone
    assert found[1] == (0 if name == "mllama" else parts.prepare(chats[0]).items[0].spans[0][0] // BLOCK * BLOCK)
    assert found[2] == (before if name == "gemma3n" else 0)
    assert found[3] == shared(parts, chats[2], chats[3])


@pytest.mark.parametrize("graphs", [0, 16])
@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("name", FAMILIES)
def test_preempted_again_and_again(
    parts_of: Callable[[str], Any],
    expected: Reference,
    serve: Callable[..., Server],
    name: str,
    overlap: str,
    graphs: int,
) -> None:
    parts = parts_of(name)
    make = parts.make
    chats = [make.chat(medium(parts, seed), "describe this " + "in detail " * seed) for seed in (1, 2, 3)]
    chats += [make.chat(medium(parts, 1), medium(parts, 2), "how many?"), make.chat("describe in detail " * 4)]
    longest = max(len(parts.prepare(chat).input_ids) for chat in chats) + NEW_TOKENS
    server = serve(
        parts,
        graphs,
        chunked_prefill_size=7 if name == "mllama" else 64,
        overlap=overlap,
        kv_cache_tokens=-(-longest // BLOCK) * BLOCK + 2 * BLOCK,
        context_length=longest,
        max_running_requests=16,
    )
    assert [tokens(answer) for answer in server.together(chats)] == [expected(parts, chat) for chat in chats]
    assert server.counts["triptych_preemptions_total"] > 0


def test_several_answers_to_one_picture(
    parts_of: Callable[[str], Any], expected: Reference, serve: Callable[..., Server]
) -> None:
    parts = parts_of("mllama")
    server = serve(parts, chunked_prefill_size=7)
    chat = chats_of(parts)[2]
    answer = server.start(chat, n=3)
    assert [tokens(answer, index) for index in range(3)] == [expected(parts, chat)] * 3
    assert len({media() for media, _ in server.slices if media is not None}) == 1


def test_what_layers_keep_of_a_picture_goes_with_the_request(
    parts_of: Callable[[str], Any], serve: Callable[..., Server]
) -> None:
    parts = parts_of("mllama")
    server = serve(parts)
    size = parts.encode(parts.prepare(chats_of(parts)[1]))["vision"].nbytes
    server.start(chats_of(parts)[1]).result()
    server.start(chats_of(parts)[0]).result()
    (media, *_), *_ = [part for part in server.slices if part[0] is not None]
    gc.collect()
    assert media() is None
    assert server.stage.engine._media_bytes == 0
    # rows, and keys and values of two layers that are half as wide
    held: list[int] = []
    answer = server.stage.engine._admission.answer
    server.stage.engine._admission.answer = lambda s, now: held.append(s.prompt.media_bytes) or answer(s, now)
    server.start(chats_of(parts)[1]).result()
    assert held == [size + 2 * size]


def test_more_pictures_than_fit_are_refused(parts_of: Callable[[str], Any], serve: Callable[..., Server]) -> None:
    parts = parts_of("mllama")
    server = serve(parts)
    config = dataclasses.replace(server.stage.engine.config, max_media_bytes=30_000)
    server.stage.engine._admission._config = config
    with pytest.raises(TriptychError, match="max_media_mb") as caught:
        server.start(chats_of(parts)[1]).result()
    assert caught.value.kind is ErrorKind.TOO_LARGE


@pytest.mark.parametrize(("chunk", "graphs"), WAYS)
def test_an_answer_that_outgrows_the_short_frequencies(
    parts_of: Callable[[str], Any], expected: Reference, serve: Callable[..., Server], chunk: int, graphs: int
) -> None:
    """It is computed anew, with its picture and its adapter, as transformers does without a cache.

    With one, transformers 5.23 drops it at that token and goes on with nothing of what came before.
    """
    parts = parts_of("phi4mm")
    make, switch = parts.make, parts.decoder.config.original_max_position_embeddings
    words = next(
        n for n in range(200) if len(parts.prepare(make.chat(make.image(1), "describe" * n)).input_ids) > switch - 8
    )
    chats = [make.chat(make.image(1), "describe" * words), make.chat(make.audio(2), "x"), make.chat("numbers 0123")]
    assert switch - NEW_TOKENS < len(parts.prepare(chats[0]).input_ids) < switch
    server = serve(parts, graphs, chunked_prefill_size=chunk, max_running_requests=16)
    inputs = parts.reference_inputs(chats[0])
    out = parts.whole.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False)
    anew = out[0, inputs["input_ids"].shape[1] :].tolist()
    others = [expected(parts, chat) for chat in chats[1:]]
    assert len(anew) == NEW_TOKENS
    assert [tokens(answer) for answer in server.together(chats)] == [anew, *others]
    # the same again: what was computed with other frequencies is not taken for it
    assert tokens(server.start(chats[0])) == anew
