"""The engine gives the tokens of transformers' ``generate`` on the same weights."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from triptych.python_models.contract.plan import MediaItem

KINDS = ["qwen2", "gemma2", "gpt_oss", "qwen2_5_vl"]


def prompt_of(length, seed=0):
    return random.Random(seed * 1000 + length).choices(range(1, 290), k=length)


@pytest.mark.parametrize("kind", KINDS)
def test_single_text(make_tiny, device, kind):
    tiny = make_tiny(kind, device)
    prompt = prompt_of(21)
    answer = tiny.ask(tiny.stage(), prompt, max_tokens=30).ok()
    assert answer.token_ids == tiny.generate(prompt, 30)
    assert answer.finish == ("length", None)
    assert answer.usage.prompt_tokens == 21
    assert answer.usage.completion_tokens == 30


@pytest.mark.parametrize("kind", KINDS)
def test_three_lengths_together_and_at_different_times(make_tiny, device, kind):
    tiny = make_tiny(kind, device)
    prompts = [prompt_of(5), prompt_of(33), prompt_of(90)]
    expected = [tiny.generate(p, 25) for p in prompts]
    stage = tiny.stage()
    together = [tiny.ask(stage, p, max_tokens=25) for p in prompts]
    assert [a.ok().token_ids for a in together] == expected
    staggered = []
    for prompt in prompts:
        staggered.append(tiny.ask(stage, prompt, max_tokens=25))
        staggered[-1].wait_first()
    assert [a.ok().token_ids for a in staggered] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_chunks_of_seven_tokens(make_tiny, device, kind):
    tiny = make_tiny(kind, device)
    prompts = [prompt_of(n) for n in (7, 8, 50, 64)]
    stage = tiny.stage(chunked_prefill_size=7)
    answers = [tiny.ask(stage, p, max_tokens=20) for p in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(p, 20) for p in prompts]


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_preemption_by_a_tiny_pool(make_tiny, device, meter, kind):
    tiny = make_tiny(kind, device)
    prompts = [prompt_of(n) for n in (9, 17, 30, 12)]
    stage = tiny.stage(meter, kv_cache_tokens=72, context_length=72)
    answers = [tiny.ask(stage, p, max_tokens=40) for p in prompts]
    assert [a.ok().token_ids for a in answers] == [tiny.generate(p, 40) for p in prompts]
    assert meter("triptych_preemptions_total") > 0


def test_a_shared_beginning_is_computed_once(make_tiny, device, meter):
    tiny = make_tiny("qwen2", device)
    stage = tiny.stage(meter)
    first, second = prompt_of(50), [*prompt_of(50)[:42], *prompt_of(9, seed=1)]
    assert tiny.ask(stage, first, max_tokens=9).ok().usage.cached_tokens == 0
    answer = tiny.ask(stage, second, max_tokens=9).ok()
    assert answer.usage.cached_tokens == 40
    assert answer.token_ids == tiny.generate(second, 9)
    # a second turn finds the answer of the first as well
    turn = [*second, *answer.token_ids, 5, 6]
    again = tiny.ask(stage, turn, max_tokens=9).ok()
    assert again.usage.cached_tokens == 56
    assert again.token_ids == tiny.generate(turn, 9)
    assert meter("triptych_cached_tokens_total") == 96


def media_case(tiny, width, spans, seed=0, length=48):
    """A prompt with random rows at ``spans``, and its reference embeddings."""
    generator = torch.Generator().manual_seed(seed)
    prompt = prompt_of(length)
    total = sum(end - start for start, end in spans)
    rows = torch.randn(total, width, generator=generator)
    where = [i for start, end in spans for i in range(start, end)]
    for i in where:
        # placeholders may lie outside the vocabulary
        prompt[i] = 299_999
    ids = torch.tensor([0 if i in where else t for i, t in enumerate(prompt)], device=tiny.device)
    with torch.no_grad():
        embeddings = tiny.reference.get_input_embeddings()(ids).clone()
    embeddings[where] = rows[:, : embeddings.shape[1]].to(tiny.device)
    return prompt, rows, embeddings, where


@pytest.mark.parametrize("chunk", [2048, 7])
def test_embeddings_at_placeholders(make_tiny, device, chunk):
    tiny = make_tiny("qwen2", device)
    spans = [(3, 12), (20, 21), (30, 44)]
    prompt, rows, embeddings, _ = media_case(tiny, 64, spans)
    items = (
        MediaItem("image", "a", ((3, 12),), "vision"),
        MediaItem("audio", "b", ((20, 21),), "audio"),
        # spans are in row order, which need not be prompt order
        MediaItem("video", "c", ((40, 44), (30, 40)), "vision"),
    )
    vision, audio = torch.cat([rows[:9], rows[20:], rows[10:20]]), rows[9:10]
    stage = tiny.stage(chunked_prefill_size=chunk)
    tensors = {"vision_embeddings": vision.to(device), "audio_embeddings": audio.numpy()}
    others = [tiny.ask(stage, prompt_of(n), max_tokens=20) for n in (4, 25)]
    answer = tiny.ask(stage, prompt, max_tokens=20, items=items, tensors=tensors).ok()
    expected = tiny.stepwise(embeddings, np.arange(48)[None], 0, 20)
    assert answer.token_ids == expected
    assert [a.ok().token_ids for a in others] == [tiny.generate(prompt_of(n), 20) for n in (4, 25)]
    usage = answer.usage
    assert (usage.image_tokens, usage.audio_tokens, usage.video_tokens, usage.prompt_tokens) == (9, 1, 14, 48)
    # and as generate() takes embeddings
    mask = torch.ones(1, 48, dtype=torch.long, device=device)
    options = {"inputs_embeds": embeddings[None], "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert tiny.reference.generate(**options)[0].tolist() == expected


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("chunk", [2048, 7])
def test_mrope_positions_and_deepstack_rows(make_tiny, device, kind, chunk):
    tiny = make_tiny(kind, device)
    deep = kind == "qwen3_vl"
    spans = [(5, 17), (25, 37)]
    prompt, rows, embeddings, where = media_case(tiny, 128 if deep else 64, spans)
    positions = np.zeros((3, 48), dtype=np.int32)
    step = 0
    for i in range(48):
        inside = next((i - s for s, e in spans if s <= i < e), None)
        if inside is None:
            step = int(positions[:, :i].max()) + 1 if i else 0
            positions[:, i] = step
        else:
            positions[:, i] = (step + 1, step + 1 + inside // 4, step + 1 + inside % 4)
    delta = int(positions.max()) + 1 - 48
    assert delta < 0
    extra = {}
    if deep:
        mask = torch.zeros(1, 48, dtype=torch.bool, device=device)
        mask[0, where] = True
        extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": [rows[:, 64:].to(device)]}
    expected = tiny.stepwise(embeddings, positions, delta, 20, **extra)
    items = tuple(MediaItem("image", f"{k}", (span,), "vision") for k, span in enumerate(spans))
    stage = tiny.stage(chunked_prefill_size=chunk)
    options = {"positions": positions, "rope_delta": delta, "items": items, "max_tokens": 20}
    first = tiny.ask(stage, prompt, tensors={"vision_embeddings": rows}, **options)
    # the same rows from two encoders, in another order than they stand in the prompt
    options["items"] = (MediaItem("audio", "0", spans[:1], "audio"), *items[1:])
    tensors = {"vision_embeddings": rows[12:], "audio_embeddings": rows[:12]}
    second = tiny.ask(stage, prompt, tensors=tensors, **options)
    assert first.ok().token_ids == expected
    assert second.ok().token_ids == expected
    plain = tiny.ask(stage, prompt_of(31), max_tokens=12).ok()
    assert plain.token_ids == tiny.generate(prompt_of(31), 12)


def test_other_pictures_at_the_same_placeholders_are_not_taken_from_the_cache(make_tiny, device):
    tiny = make_tiny("qwen2", device)
    stage = tiny.stage()
    cached = []
    for seed, digest in ((1, "one"), (2, "two"), (1, "one")):
        prompt, rows, embeddings, _ = media_case(tiny, 64, [(6, 40)], seed)
        items = (MediaItem("image", digest, ((6, 40),), "vision"),)
        answer = tiny.ask(stage, prompt, items=items, tensors={"vision_embeddings": rows}, max_tokens=16).ok()
        assert answer.token_ids == tiny.stepwise(embeddings, np.arange(48)[None], 0, 16)
        cached.append(answer.usage.cached_tokens)
    assert cached == [0, 4, 44]
