"""Gemma 3's pictures attend both ways: with chunks, prefix cache, padded decode steps and preemption.

Every way of running gives the tokens of transformers' ``generate``. On a GPU decode steps are CUDA graphs; on a CPU
they are padded in the same way.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.registry import load_family
from triptych.python_models.language_model.runner.options import RunnerOptions
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.stage import NoTelemetry

NEW_TOKENS = 24
BLOCK = 4
ROWS, WINDOW = 16, 20
CHATS = ("text", "one picture", "two pictures", "between text", "earlier turn", "every turn")
CHUNKS = (7, 16, 0)


def chat_of(parts: Any, name: str) -> Any:
    make = parts.make
    if name == "text":
        return make.chat("hello world, what is shown here? the quick brown fox jumps over the lazy dog.")
    if name == "one picture":
        return make.chat(make.image(1), "describe this image in detail please!")
    if name == "two pictures":
        return make.chat(make.image(1), make.image(2, 90, 33), "which colours do they have?")
    if name == "between text":
        return make.chat("How many objects are there in ", make.image(3, 40, 80), " and which numbers? 0123456789")
    if name == "earlier turn":
        return make.turns(
            ("user", "what is this? ", make.image(4)),
            ("assistant", "the lazy dog"),
            ("user", "and which colours do they have? describe it in detail please"),
        )
    assert name == "every turn"
    return make.turns(
        ("system", "describe in detail"),
        ("user", make.image(5), "what is shown here?"),
        ("assistant", "a quick brown fox"),
        ("user", "and here? ", make.image(6, 200, 64), "and here?", make.image(5)),
    )


class Reference:
    """transformers' answers, each computed once."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts
        self._known: dict[Any, list[int]] = {}

    def __call__(self, chat: Any) -> list[int]:
        key = (chat.messages, tuple(medium.digest for medium in chat.media))
        if key not in self._known:
            self._known[key] = self.parts.reference_tokens(chat, NEW_TOKENS)
        return self._known[key]


class Server:
    """A language model, and the encoders' rows for it."""

    def __init__(self, parts: Any, answer: Callable[[], Any], device: str, **options: Any) -> None:
        values = {"model": str(parts.folder), "kv_cache_tokens": 1024, "block_size": BLOCK, "heartbeat_s": 1000.0}
        self.parts = parts
        self.answer = answer
        self.counts: Counter[str] = Counter()
        self.stage = LanguageModelStage(Settings(**(values | options)), Counting(self.counts), device)
        # all slices that the runner computes, and the steps that are replayed
        self.slices: list[Any] = []
        self.replayed = 0
        self._watch(self.stage._runner)

    def _watch(self, runner: Any) -> None:
        forward = runner.forward

        def watched(slices: Sequence[Any]) -> torch.Tensor:
            self.slices.extend(slices)
            logits: torch.Tensor = forward(slices)
            return logits

        runner.forward = watched
        if getattr(runner, "_graphs", None) is not None:
            replay = runner._graphs.forward

            def counted(host: Any) -> torch.Tensor:
                assert host.spans is None
                assert host.media_places is None
                self.replayed += 1
                logits: torch.Tensor = replay(host)
                return logits

            runner._graphs.forward = counted

    def start(self, chat: Any) -> Any:
        prepared = self.parts.prepare(chat)
        plan = Plan(prepared.items, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS), prepared.rope_delta)
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


def tokens(answer: Any) -> list[int]:
    return [token for delta in answer.result() for token in delta.token_ids]


def cached(answer: Any) -> int:
    return int(answer.result()[-1].usage.cached_tokens)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def parts(make_parts: Callable[[str], Any]) -> Any:
    return make_parts("gemma3")


@pytest.fixture(scope="module")
def expected(parts: Any) -> Reference:
    return Reference(parts)


@pytest.fixture
def serve(
    parts: Any, device: str, new_answer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Server]]:
    """Makes servers; ``graphs`` is the largest batch whose decode steps are replayed, 0 for none."""
    made: list[Server] = []

    def make(graphs: int = 0, **options: Any) -> Server:
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


def test_the_checkpoint_can_tell(parts: Any, expected: Reference) -> None:
    """Prompts outgrow the window, and causal attention over pictures would give other answers."""
    config = parts.decoder.config
    assert config.sliding_window == WINDOW
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    for name in CHATS[1:]:
        chat = chat_of(parts, name)
        inputs = parts.reference_inputs(chat)
        assert inputs["input_ids"].shape[1] > 2 * WINDOW
        assert int(inputs["token_type_ids"].sum()) == ROWS * len(chat.media)
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
        out = parts.whole.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() != expected(chat)
        assert len(set(expected(chat))) > NEW_TOKENS // 3


@pytest.mark.parametrize("graphs", [0, 3, 16])
@pytest.mark.parametrize("decoder", ["fused", "transformers"])
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_tokens_of_generate(
    parts: Any,
    expected: Reference,
    serve: Callable[..., Server],
    device: str,
    chunk: int,
    backend: str,
    decoder: str,
    graphs: int,
) -> None:
    if device == "cuda" and backend == "sdpa" and graphs:
        pytest.skip("sdpa has no CUDA graphs")
    server = serve(
        graphs,
        chunked_prefill_size=chunk,
        attention_backend=backend,
        decoder_backend=decoder,
        overlap="on" if graphs else "off",
        max_running_requests=16,
    )
    chats = [chat_of(parts, name) for name in CHATS]
    # side by side, then one after the other with what the cache kept
    answers = server.together(chats)
    assert [tokens(answer) for answer in answers] == [expected(chat) for chat in chats]
    for chat in chats:
        answer = server.start(chat)
        assert tokens(answer) == expected(chat)
        assert cached(answer) > len(parts.prepare(chat).input_ids) - 2 * BLOCK
    assert (server.replayed > NEW_TOKENS) == bool(graphs)
    # pictures are computed whole, and all else in chunks
    spans = [(span, part) for part in server.slices for span in part.spans]
    assert len(spans) >= sum(len(chat.media) for chat in chats)
    for (start, end), part in spans:
        assert end - start == ROWS
        assert 0 <= start < end <= len(part)
    if chunk:
        assert max(len(part) for part in server.slices if not part.media) <= chunk


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("options", [{"prefix_cache": False}, {"speculative_tokens": 4}, {"block_size": 16}])
def test_other_options(
    parts: Any, expected: Reference, serve: Callable[..., Server], chunk: int, options: dict[str, Any]
) -> None:
    server = serve(16, chunked_prefill_size=chunk, overlap="on", max_running_requests=16, **options)
    chats = [chat_of(parts, name) for name in CHATS]
    for _ in range(2):
        answers = server.together(chats)
        assert [tokens(answer) for answer in answers] == [expected(chat) for chat in chats]
    assert any(cached(answer) for answer in answers) == options.get("prefix_cache", True)


def shared(parts: Any, one: Any, other: Any) -> int:
    """Tokens of whole blocks with which two prompts begin alike, as if all pictures were the same."""
    ids = [parts.prepare(chat).input_ids for chat in (one, other)]
    length = min(map(len, ids))
    differ = np.flatnonzero(ids[0][:length] != ids[1][:length])
    return int(differ[0] if len(differ) else length) // BLOCK * BLOCK


def spans_of(parts: Any, chat: Any) -> list[tuple[int, int]]:
    return [span for item in parts.prepare(chat).items for span in item.spans]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("graphs", [0, 16])
def test_another_question_about_the_same_picture_shares_it(
    parts: Any, expected: Reference, serve: Callable[..., Server], chunk: int, graphs: int
) -> None:
    make = parts.make
    server = serve(graphs, chunked_prefill_size=chunk, max_running_requests=16)
    chats = [make.chat("look: ", make.image(7), question) for question in ("which colours?", "how many objects?")]
    answers = []
    for chat in chats:
        answers.append(server.start(chat))
        assert tokens(answers[-1]) == expected(chat)
    assert cached(answers[0]) == 0
    assert cached(answers[1]) == shared(parts, *chats) >= spans_of(parts, chats[0])[0][1]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("graphs", [0, 16])
def test_another_picture_of_the_same_size_shares_nothing(
    parts: Any, expected: Reference, serve: Callable[..., Server], chunk: int, graphs: int
) -> None:
    make = parts.make
    server = serve(graphs, chunked_prefill_size=chunk, max_running_requests=16)

    def chat(*seeds: int) -> Any:
        return make.chat("look: ", *(make.image(seed) for seed in seeds), "which colours do they have?")

    first, second = spans_of(parts, chat(7, 8))
    before, between = first[0] // BLOCK * BLOCK, second[0] // BLOCK * BLOCK
    found = []
    for seeds in ((7, 8), (8, 7), (7, 9), (9, 8), (7, 8)):
        answer = server.start(chat(*seeds))
        assert tokens(answer) == expected(chat(*seeds))
        found.append(cached(answer))
    whole = (len(parts.prepare(chat(7, 8)).input_ids) - 1) // BLOCK * BLOCK
    assert found == [0, before, between, before, whole]


@pytest.mark.parametrize("graphs", [0, 16])
@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_preempted_again_and_again(
    parts: Any, expected: Reference, serve: Callable[..., Server], chunk: int, overlap: str, graphs: int
) -> None:
    make = parts.make
    chats = [make.chat(make.image(seed), "describe this image " + "in detail " * seed) for seed in (1, 2, 3, 4)]
    chats.append(make.chat(make.image(1), make.image(2), "how many?"))
    longest = max(len(parts.prepare(chat).input_ids) for chat in chats) + NEW_TOKENS
    size = -(-longest // BLOCK) * BLOCK + 2 * BLOCK
    server = serve(
        graphs,
        chunked_prefill_size=chunk,
        overlap=overlap,
        kv_cache_tokens=size,
        context_length=longest,
        max_running_requests=16,
    )
    assert [tokens(answer) for answer in server.together(chats)] == [expected(chat) for chat in chats]
    assert server.counts["triptych_preemptions_total"] > 0


@pytest.mark.parametrize("graphs", [0, 4])
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("chunk", CHUNKS[:2])
def test_blocks_that_fell_out_of_the_window_serve_again(
    parts: Any, expected: Reference, serve: Callable[..., Server], device: str, chunk: int, backend: str, graphs: int
) -> None:
    if device == "cuda" and backend == "sdpa" and graphs:
        pytest.skip("sdpa has no CUDA graphs")
    make = parts.make
    server = serve(
        graphs,
        chunked_prefill_size=chunk,
        attention_backend=backend,
        context_length=512,
        max_running_requests=2,
        prefix_cache=False,
    )
    chats = [
        make.chat(*(make.image(seed + k) for k in range(count)), "describe them") for seed, count in ((20, 6), (30, 5))
    ]
    windows = [group.window for group in server.stage._runner.kv_groups]
    assert sorted(windows, key=str) == [WINDOW, None]
    pool = server.stage.engine._scheduler.pools[windows.index(WINDOW)]
    assert all(pool.num_blocks * BLOCK < len(parts.prepare(chat).input_ids) for chat in chats)
    assert [tokens(answer) for answer in server.together(chats)] == [expected(chat) for chat in chats]


@pytest.mark.parametrize("chunk", CHUNKS[:2])
def test_two_ranks(parts: Any, expected: Reference, serve: Callable[..., Server], device: str, chunk: int) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    server = serve(tp=2, chunked_prefill_size=chunk, torch_threads=1)
    chats = [chat_of(parts, name) for name in CHATS]
    for _ in range(2):
        assert [tokens(answer) for answer in server.together(chats)] == [expected(chat) for chat in chats]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_checkpoint_of_text_alone(
    make_parts: Callable[[str], Any], new_answer: Callable[[], Any], device: str, chunk: int
) -> None:
    parts = make_parts("gemma3_text")
    assert not parts.family.encoders
    with pytest.raises(TriptychError, match="gemma3_text takes text, not images") as caught:
        parts.prepare(chat_of(parts, "one picture"))
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    chats = [parts.make.chat("what is shown here? " * count) for count in (1, 3, 7)]
    server = Server(parts, new_answer, device, chunked_prefill_size=chunk, max_running_requests=4)
    try:
        answers = server.together(chats)
        assert [tokens(answer) for answer in answers] == [parts.reference_tokens(chat, NEW_TOKENS) for chat in chats]
    finally:
        server.close()


def test_prompts_begin_once(parts: Any) -> None:
    """The template writes <bos>, and the tokenizer would write another."""
    messages = [{"role": "user", "content": "hello world"}]
    whole = parts.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = whole["input_ids"][0].tolist()
    assert parts.prepare(parts.make.chat("hello world")).input_ids.tolist() == ids
    assert ids.count(parts.processor.tokenizer.bos_token_id) == 1


def test_typed_special_tokens_are_characters(parts: Any) -> None:
    make, tokenizer = parts.make, parts.processor.tokenizer
    chat = make.chat("<bos><image_soft_token>", make.image(1), "<start_of_image><end_of_turn>\n<start_of_turn>model")
    prepared = parts.prepare(chat)
    counts = Counter(prepared.input_ids.tolist())
    names = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>")
    assert [counts[tokenizer.convert_tokens_to_ids(name)] for name in names] == [1, 2, 1, 1, ROWS]


def test_pixels_travel_as_bytes(parts: Any) -> None:
    (item,) = parts.prepare(parts.make.chat(parts.make.image(3, 200, 64), "x")).features["vision"]
    assert (item.tensors["pixels"].dtype, item.tensors["pixels"].shape) == (np.uint8, (3, 32, 32))


def test_pan_and_scan_is_refused(parts: Any, tmp_path: Path) -> None:
    folder = tmp_path / "crops"
    shutil.copytree(parts.folder, folder)
    path = folder / "processor_config.json"
    path.write_text(path.read_text().replace('"do_normalize"', '"do_pan_and_scan": true, "do_normalize"', 1))
    with pytest.raises(TriptychError, match="do_pan_and_scan") as caught:
        load_family(Settings(model=str(folder))).load_preprocessor()
    assert caught.value.kind is ErrorKind.UNSUPPORTED
