"""Through the real stages: encoders with their batching and cache, the engine with its paged cache and batching."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.features import pack
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.encoder.stage import AudioEncoderStage, VisionEncoderStage
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.stage import NoTelemetry

NEW_TOKENS = 12


class Counts(NoTelemetry):
    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self.totals[name] += int(value)


class Server:
    """The stages behind ``preprocess``, joined by hand."""

    def __init__(self, parts: Any, answer: Callable[[], Any], device: str = "cpu", **options: Any) -> None:
        self.parts = parts
        self.answer = answer
        self.counts = Counts()
        self.encoders = {
            "vision": VisionEncoderStage(parts.settings, self.counts, device),
            "audio": AudioEncoderStage(parts.settings, self.counts, device),
        }
        self.language_model = LanguageModelStage(replace(parts.settings, **options), NoTelemetry(), device)
        self.sent = 0

    def close(self) -> None:
        for stage in (*self.encoders.values(), self.language_model):
            stage.close()

    def encode(self, prepared: Any) -> dict[str, Any]:
        embeddings: dict[str, Any] = {}
        for name, stage in self.encoders.items():
            answer = self.answer()
            items = prepared.features.get(name)
            stage.submit(f"e{self.sent}", {f"{name}_features": pack(items)} if items else {}, answer)
            (tensors,) = answer.result()
            embeddings |= tensors
        return embeddings

    def start(self, chat: Any, **options: Any) -> Any:
        prepared = self.parts.prepare(chat)
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": NEW_TOKENS, **options})
        plan = Plan(prepared.items, sampling, prepared.rope_delta, extras=prepared.extras)
        inputs: Mapping[str, Any] = {
            "input_ids": prepared.input_ids,
            "position_ids": prepared.position_ids,
            "plan": [plan.to_json().encode()],
            **self.encode(prepared),
        }
        self.sent += 1
        answer = self.answer()
        self.language_model.submit(f"r{self.sent}", inputs, answer)
        return answer

    def tokens(self, answer: Any) -> list[int]:
        deltas: list[Delta] = answer.result()
        assert deltas[-1].finish_reason in ("stop", "length")
        return without_end(self.parts, [token for delta in deltas for token in delta.token_ids])


def without_end(parts: Any, tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in parts.decoder.eos_token_ids else tokens


def expected(parts: Any, chat: Any) -> list[int]:
    return without_end(parts, parts.reference_tokens(chat, NEW_TOKENS))


@pytest.fixture(scope="module")
def server(parts: Any, new_answer: Callable[[], Any]) -> Iterator[Server]:
    made = Server(parts, new_answer)
    yield made
    made.close()


def test_each_modality(server: Server) -> None:
    check_each_modality(server)


@pytest.mark.gpu
def test_each_modality_on_the_gpu(parts: Any, new_answer: Callable[[], Any]) -> None:
    """Embeddings go from encoder to language model on the device."""
    server = Server(parts, new_answer, "cuda:0")
    try:
        prepared = parts.prepare(parts.make.chat(parts.make.any(1), "x"))
        (encoder,) = prepared.features
        assert server.encode(prepared)[f"{encoder}_embeddings"].is_cuda
        check_each_modality(server)
    finally:
        server.close()


def check_each_modality(server: Server) -> None:
    make = server.parts.make
    media = {
        "image": [make.image(1), make.image(2, 90, 33)],
        "video": [make.video(5, frames=6, duration=5.0)],
        "audio": [make.audio(6)],
    }
    chats = [make.chat("hello world, what is shown?")]
    for name in server.parts.modalities:
        chats += [make.chat(medium, "describe this") for medium in media[name]]
        chats.append(make.chat("first ", media[name][-1], "then"))
    for chat in chats:
        assert server.tokens(server.start(chat)) == expected(server.parts, chat)


def test_prompts_in_chunks_of_a_few_tokens(parts: Any, new_answer: Callable[[], Any]) -> None:
    """The decoder's own modules; chunks begin and end inside of media."""
    server = Server(parts, new_answer, chunked_prefill_size=7, decoder_backend="transformers", prefix_cache=False)
    try:
        make = parts.make
        media = [getattr(make, name)(3) for name in parts.modalities]
        chats = [make.chat("what? ", medium, "describe it in detail") for medium in media]
        answers = [server.start(chat) for chat in chats]
        assert [server.tokens(answer) for answer in answers] == [expected(parts, chat) for chat in chats]
    finally:
        server.close()


def test_three_requests_of_different_lengths_together(server: Server) -> None:
    make, modalities = server.parts.make, server.parts.modalities
    chats = [
        make.chat("hi"),
        make.turns(
            ("system", "describe in detail"),
            ("user", make.any(1), "what is this?"),
            ("assistant", "a lazy dog"),
            ("user", "and this?", *([] if "two" in server.parts.without else [make.any(2)]), "how many objects?"),
        ),
        make.chat(getattr(make, modalities[-1])(7), "x"),
    ]
    answers = [server.start(chat) for chat in chats]
    assert [server.tokens(a) for a in answers] == [expected(server.parts, chat) for chat in chats]


def test_a_repeated_medium_comes_from_the_cache(server: Server) -> None:
    make = server.parts.make
    chats = [make.chat(make.any(11), "describe"), make.chat("look: ", make.any(11), "what colours?")]
    found = [server.tokens(server.start(chats[0]))]
    before = Counter(server.counts.totals)
    found.append(server.tokens(server.start(chats[1])))
    assert server.counts.totals["triptych_encoder_cache_hits_total"] == before["triptych_encoder_cache_hits_total"] + 1
    assert server.counts.totals["triptych_encoder_cache_misses_total"] == before["triptych_encoder_cache_misses_total"]
    assert found == [expected(server.parts, chat) for chat in chats]


def test_a_medium_twice_in_one_request(server: Server) -> None:
    if reason := server.parts.without.get("two"):
        pytest.skip(reason)
    make = server.parts.make
    chat = make.chat(make.any(12), "and", make.any(12), "the same?")
    before = Counter(server.counts.totals)
    assert server.tokens(server.start(chat)) == expected(server.parts, chat)
    assert (
        server.counts.totals["triptych_encoder_cache_misses_total"] == before["triptych_encoder_cache_misses_total"] + 1
    )


def test_everything_in_one_conversation(server: Server) -> None:
    if reason := server.parts.without.get("mixed") or server.parts.without.get("two"):
        pytest.skip(reason)
    make = server.parts.make
    media = make.each(1) + make.each(21)
    chat = make.turns(
        ("user", *media[::2], "what is the connection?"),
        ("assistant", "none"),
        ("user", media[1], "and here?", *media[3::2]),
    )
    assert server.tokens(server.start(chat)) == expected(server.parts, chat)


def test_typed_special_tokens_do_not_end_the_turn(server: Server) -> None:
    """What the engine answers to literal special tokens equals the whole model's answer to those characters."""
    import torch

    make, parts = server.parts.make, server.parts
    control = parts.preprocessor.control_tokens
    special = [token for token in parts.decoder.tokenizer.all_special_tokens if token not in control]
    chat = make.chat("a\n".join([*special[:8], "system", *special[-4:]]))
    prepared = parts.prepare(chat)
    plain = Counter(parts.prepare(make.chat("x")).input_ids.tolist())
    counts = Counter(prepared.input_ids.tolist())
    assert all(counts[i] == plain[i] for i in parts.decoder.tokenizer.convert_tokens_to_ids(special))
    parts.whole.base_model.rope_deltas = None
    ids = torch.from_numpy(prepared.input_ids.astype("int64"))[None]
    with torch.no_grad():
        out = parts.whole.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    assert server.tokens(server.start(chat)) == without_end(parts, out[0, ids.shape[1] :].tolist())
