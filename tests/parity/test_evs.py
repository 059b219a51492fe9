"""Families other than Nemotron whose videos can lose tokens: the answer is that to the prompt without those tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triptych.client.launcher import TritonServer, find_server
from triptych.client.sdk import Client
from triptych.kernels.evs import num_kept
from triptych.python_models.contract.features import pack
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.encoder.stage import VisionEncoderStage
from triptych.python_models.families.registry import load_family
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.media.types import Medium, Video
from triptych.python_models.stage import NoTelemetry

from .test_served import LOAD_S, Served

NEW_TOKENS = 10
FRAMES = 6


def clip(seed: int) -> Medium:
    """Halves of a picture change now and then."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((FRAMES, 64, 64, 3), dtype=np.uint8)
    pixels[:] = rng.integers(0, 256, (64, 64, 3))
    for frame in range(1, FRAMES):
        pixels[frame] = pixels[frame - 1]
        side = slice(0, 32) if rng.random() < 0.5 else slice(32, 64)
        pixels[frame, :, side] = rng.integers(0, 256, (64, 32, 3))
    video = Video(pixels, 2.0, FRAMES / 2, 16.0, tuple(range(0, 8 * FRAMES, 8)), 8 * FRAMES)
    return Medium("video", video, f"clip-{seed}", "messages[0]")


def expected(parts: Any, chat: Any, rate: float) -> list[int]:
    """The whole prompt with its embeddings, less the tokens that transformers' own pruning leaves out."""
    from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import compute_retention_mask

    prepared = parts.prepare(chat)
    embeddings, _ = parts.splice(prepared)
    (item,) = prepared.items
    places = np.concatenate([np.arange(start, end) for start, end in item.spans])
    frames = len(chat.media[0].data.frames)
    side = int((len(places) // frames) ** 0.5)
    mask = compute_retention_mask(
        video_embeds=embeddings[places], thw=(frames, side, side), spatial_merge_size=1, q=rate
    )
    keep = torch.ones(len(embeddings), dtype=torch.bool)
    keep[places] = mask
    embeddings = embeddings[keep]
    answer: list[int] = []
    while len(answer) < NEW_TOKENS:
        with torch.no_grad():
            hidden = parts.decoder.text_model(
                inputs_embeds=embeddings[None], position_ids=torch.arange(len(embeddings))[None], use_cache=False
            ).last_hidden_state
            token = int(parts.decoder.lm_head(hidden[0, -1]).argmax())
        if token in parts.decoder.eos_token_ids:
            break
        answer.append(token)
        new = parts.decoder.embed(torch.tensor([token]), torch.tensor([False]))
        embeddings = torch.cat([embeddings, new])
    return answer


@pytest.mark.parametrize("family", ["internvl", "llava_next_video", "nemotron_nano_vl"])
def test_tokens_are_those_of_the_shorter_prompt(
    make_parts: Callable[[str], Any], new_answer: Callable[[], Any], family: str
) -> None:
    parts = make_parts(family)
    rate = 0.5
    settings = replace(parts.settings, video_pruning_rate=f"{rate}")
    preprocessor = load_family(settings).load_preprocessor()
    encoder = VisionEncoderStage(settings, NoTelemetry(), "cpu")
    language_model = LanguageModelStage(settings, NoTelemetry(), "cpu")
    try:
        for seed in (1, 2):
            chat = parts.make.chat("first ", clip(seed), "what changes?")
            prepared = preprocessor.prepare(chat.messages, chat.media)
            (item,) = parts.prepare(chat).items
            assert prepared.items[0].num_tokens == num_kept(FRAMES, item.num_tokens // FRAMES, rate)
            answer = new_answer()
            encoder.submit("e", {"vision_features": pack(prepared.features["vision"])}, answer)
            (tensors,) = answer.result()
            plan = Plan(prepared.items, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS))
            inputs = {"input_ids": prepared.input_ids, "position_ids": prepared.position_ids, **tensors}
            answer = new_answer()
            language_model.submit("r", inputs | {"plan": [plan.to_json().encode()]}, answer)
            tokens = [token for delta in answer.result() for token in delta.token_ids]
            without_end = tokens[:-1] if tokens[-1] in parts.decoder.eos_token_ids else tokens
            assert without_end == expected(parts, chat, rate)
    finally:
        encoder.close()
        language_model.close()


def test_through_the_real_server(make_parts: Callable[[str], Any], tmp_path: Path) -> None:
    """What only the encoder knows goes from process to process."""
    parts = make_parts("nemotron_nano_vl")
    settings = replace(parts.settings, device="cpu", torch_threads=1, video_pruning_rate="0.6")
    with TritonServer(find_server(), settings, log=tmp_path / "server.log") as server:
        server.wait_ready(LOAD_S, lambda said: None)
        with Client(server.grpc_url) as client:
            served = Served(parts, server, client, tmp_path)
            chat = parts.make.chat("first ", served.medium("video", 3), "what changes?")
            # the second time from the caches of encoder and language model
            for _ in range(2):
                deltas = list(served.ask(chat))
                tokens = [token for delta in deltas for token in delta.token_ids]
                without_end = tokens[:-1] if tokens[-1] in parts.decoder.eos_token_ids else tokens
                assert without_end == expected(parts, chat, 0.6)
            whole = parts.prepare(chat)
            (item,) = whole.items
            left_out = item.num_tokens - num_kept(len(item.spans), item.num_tokens // len(item.spans), 0.6)
            assert left_out > 0
            assert deltas[-1].usage.prompt_tokens == len(whole.input_ids) - left_out
