"""Nemotron's videos with tokens left out, through the real stages, beside transformers' own pruning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from triptych.kernels.evs import num_kept
from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.features import pack
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.encoder.stage import VisionEncoderStage
from triptych.python_models.families.registry import load_family
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.media.types import Medium, Video
from triptych.python_models.stage import NoTelemetry

NEW_TOKENS = 10
FRAMES = 20
GROUPS, AREA = 10, 4


def clip(seed: int, side: int = 64, frames: int = FRAMES) -> Medium:
    """Corners of a picture change now and then, each at other times."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((frames, side, side, 3), dtype=np.uint8)
    pixels[:] = rng.integers(0, 256, (side, side, 3))
    half = side // 2
    for frame in range(1, frames):
        pixels[frame] = pixels[frame - 1]
        for top in (0, half):
            for left in (0, half):
                if rng.random() < 0.3:
                    pixels[frame, top : top + half, left : left + half] = rng.integers(0, 256, (half, half, 3))
    video = Video(pixels, 2.0, frames / 2, 16.0, tuple(range(0, 8 * frames, 8)), 8 * frames)
    return Medium("video", video, f"clip-{seed}-{side}-{frames}", "messages[0]")


class Stages:
    """preprocess, vision_encoder and language_model with one pruning rate."""

    def __init__(self, parts: Any, rate: str, answer: Callable[[], Any]) -> None:
        self.parts = parts
        self.answer = answer
        settings = replace(parts.settings, video_pruning_rate=rate)
        self.preprocessor = load_family(settings).load_preprocessor()
        self.encoder = VisionEncoderStage(settings, NoTelemetry(), "cpu")
        self.language_model = LanguageModelStage(settings, NoTelemetry(), "cpu")

    def close(self) -> None:
        self.encoder.close()
        self.language_model.close()

    def encode(self, prepared: Any) -> dict[str, Any]:
        answer = self.answer()
        self.encoder.submit("e", {"vision_features": pack(prepared.features["vision"])}, answer)
        (tensors,) = answer.result()
        found: dict[str, Any] = tensors
        return found

    def ask(self, chat: Any) -> Any:
        prepared = self.preprocessor.prepare(chat.messages, chat.media)
        plan = Plan(prepared.items, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS), prepared.rope_delta)
        answer = self.answer()
        inputs = {
            "input_ids": prepared.input_ids,
            "position_ids": prepared.position_ids,
            "plan": [plan.to_json().encode()],
            **self.encode(prepared),
        }
        self.language_model.submit("r", inputs, answer)
        return answer

    def tokens(self, answer: Any) -> list[int]:
        found = [token for delta in answer.result() for token in delta.token_ids]
        return found[:-1] if found[-1] in self.parts.decoder.eos_token_ids else found


@pytest.fixture(scope="module")
def omni(make_parts: Callable[[str], Any]) -> Any:
    return make_parts("nemotron_h_omni")


@pytest.fixture
def make_stages(omni: Any, new_answer: Callable[[], Any]) -> Iterator[Callable[[str], Stages]]:
    made: list[Stages] = []

    def make(rate: str) -> Stages:
        made.append(Stages(omni, rate, new_answer))
        return made[-1]

    yield make
    for stages in made:
        stages.close()


def expected(parts: Any, chat: Any, rate: float) -> list[int]:
    """transformers, which computes all anew for each token: its generate does not know that the prompt gets shorter."""
    inputs = parts.reference_inputs(chat)
    whole = parts.whole
    whole.video_pruning_rate = rate
    ids = inputs.pop("input_ids")
    del inputs["attention_mask"]
    answer: list[int] = []
    try:
        while len(answer) < NEW_TOKENS:
            with torch.no_grad():
                own = torch.cat([ids, torch.tensor([answer], dtype=torch.long)], 1)
                token = int(whole(input_ids=own, **inputs).logits[0, -1].argmax())
            if token in parts.decoder.eos_token_ids:
                break
            answer.append(token)
    finally:
        whole.video_pruning_rate = 0.0
    return answer


@pytest.mark.parametrize("rate", ["0", "0.5", "0.7"])
def test_tokens_equal_transformers_own(omni: Any, make_stages: Callable[[str], Stages], rate: str) -> None:
    stages = make_stages(rate)
    plain = omni.preprocessor
    chats = [omni.make.chat("first ", clip(seed), "what changes?") for seed in (1, 2, 3)]
    answers = [stages.ask(chat) for chat in chats]
    assert [stages.tokens(a) for a in answers] == [expected(omni, chat, float(rate)) for chat in chats]
    # and once more, from the caches of encoder and language model
    again = stages.ask(chats[1])
    assert stages.tokens(again) == expected(omni, chats[1], float(rate))
    usage = again.responses[-1].usage
    assert usage.cached_tokens > usage.prompt_tokens - 2 * 16
    for chat in chats:
        prepared = stages.preprocessor.prepare(chat.messages, chat.media)
        whole = plain.prepare(chat.messages, chat.media)
        left_out = GROUPS * AREA - num_kept(GROUPS, AREA, float(rate))
        assert len(prepared.input_ids) == len(whole.input_ids) - left_out
        assert left_out == {"0": 0, "0.5": 20, "0.7": 28}[rate]
        if not left_out:
            assert prepared.input_ids.tolist() == whole.input_ids.tolist()
            assert prepared.items == whole.items


def test_the_prompt_is_transformers_without_the_tokens_left_out(
    omni: Any, make_stages: Callable[[str], Stages]
) -> None:
    """After the encoder has spoken: text between frames where it was, and each frame with what is left of it."""
    from triptych.python_models.language_model.runs import settle

    stages = make_stages("0.6")
    chat = omni.make.chat("first ", clip(4), "then")
    prepared = stages.preprocessor.prepare(chat.messages, chat.media)
    found = stages.encode(prepared)
    ids, (item,) = settle(prepared.input_ids.astype(np.int64), prepared.items, found["vision_runs"].tolist())
    whole = omni.reference_inputs(chat)
    full = whole["input_ids"][0]
    frames = omni.whole.get_video_features(whole["pixel_values_videos"]).pooler_output[0]
    from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import compute_retention_mask

    mask = compute_retention_mask(video_embeds=frames, thw=(GROUPS, 2, 2), spatial_merge_size=1, q=0.6)
    keep = torch.ones_like(full, dtype=torch.bool)
    keep[full == omni.preprocessor.token_id("image")] = mask
    assert ids.tolist() == full[keep].tolist()
    assert len(set(found["vision_runs"].tolist())) > 1, "frames that all keep as much prove nothing"
    torch.testing.assert_close(found["vision_embeddings"], frames.flatten(0, 1)[mask], atol=1e-5, rtol=1e-5)
    assert item.num_rows == int(mask.sum())


def test_pictures_and_several_videos_beside_each_other(omni: Any, make_stages: Callable[[str], Stages]) -> None:
    """Of what transformers takes no more than one video a prompt: every place holds the rows it is for."""
    stages = make_stages("0.5")
    make = omni.make
    chat = make.chat(clip(1), "and ", make.image(1), " and ", clip(2, frames=7), " or ", clip(1), "?")
    prepared = stages.preprocessor.prepare(chat.messages, chat.media)
    found = stages.encode(prepared)
    alone = {}
    for medium in chat.media:
        one = make.chat(medium, "x")
        alone[medium.digest] = stages.encode(stages.preprocessor.prepare(one.messages, one.media))
    rows = torch.cat([alone[m.digest]["vision_embeddings"] for m in chat.media])
    torch.testing.assert_close(found["vision_embeddings"], rows, atol=1e-5, rtol=1e-5)
    runs = [n for m in chat.media for n in alone[m.digest].get("vision_runs", np.empty(0, int)).tolist()]
    assert found["vision_runs"].tolist() == runs
    assert [len(item.runs) for item in prepared.items] == [10, 0, 4, 10]
    # spans hold placeholders and nothing else
    token = omni.preprocessor.token_id("image")
    covered = sorted(i for item in prepared.items for start, end in item.spans for i in range(start, end))
    assert covered == np.flatnonzero(prepared.input_ids == token).tolist()
    assert len(stages.tokens(stages.ask(chat))) > 0


def test_another_rate_is_another_medium(omni: Any, make_stages: Callable[[str], Stages]) -> None:
    chat = omni.make.chat(clip(1), omni.make.image(1), "x")
    digests = [
        [i.digest for i in make_stages(rate).preprocessor.prepare(chat.messages, chat.media).items]
        for rate in ("0", "0.5", "0.7")
    ]
    assert len({video for video, _ in digests}) == 3
    assert len({image for _, image in digests}) == 1


def test_the_checkpoint_says_how_much_unless_the_option_does(omni: Any) -> None:
    for rate, option, kept in ((0.5, "", 20), (0.5, "0", 40), (0.0, "0.7", 12), (0.0, "", 40)):
        own = json.dumps({"video_pruning_rate": rate})
        family = load_family(replace(omni.settings, video_pruning_rate=option, json_model_override_args=own))
        chat = omni.make.chat(clip(1), "x")
        (item,) = family.load_preprocessor().prepare(chat.messages, chat.media).items
        assert item.num_tokens == kept


def test_the_published_format_says_it_too(make_parts: Callable[[str], Any]) -> None:
    nano = make_parts("nemotron_nano_vl")
    for rate, kept in ((0.0, 80), (0.7, 24)):
        settings = replace(nano.settings, json_model_override_args=json.dumps({"video_pruning_rate": rate}))
        chat = nano.make.chat(clip(1), "x")
        (item,) = load_family(settings).load_preprocessor().prepare(chat.messages, chat.media).items
        # one picture for each frame, not for each pair
        assert item.num_tokens == kept


def test_families_whose_positions_forbid_it_refuse_the_option(make_parts: Callable[[str], Any]) -> None:
    settings = replace(make_parts("qwen2_5_vl").settings, video_pruning_rate="0.5")
    with pytest.raises(TriptychError, match="positions count tokens") as caught:
        load_family(settings).load_preprocessor()
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert caught.value.param == "settings.video_pruning_rate"
