"""The engine against transformers' own ``generate`` on the same checkpoint in one run; what a cached picture saves.

    python benchmarks/generate.py [--model builtin] [--device cpu]

The sides take turns. ``generate`` answers one request after the other (batch 1), as its callers do; a batch of 8 equal
lengths is shown beside it. Answers are greedy and have their full length; first the tokens of both sides are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from typing import Any

import numpy as np
from support import picture, save

from triptych.python_models.contract.request import ChatRequest, MediaPart, Message, TextPart
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import torchvision_fix

torchvision_fix.install()

import torch  # noqa: E402
import transformers  # noqa: E402

from triptych.python_models.families.checkpoint import find_checkpoint  # noqa: E402
from triptych.python_models.local import LocalEnsemble  # noqa: E402

QUESTIONS = [f"What is there to see, and what is number {i}?" for i in range(40)]


def ask(local: LocalEnsemble, text: str, png: bytes | None, tokens: int) -> tuple[float, list[int]]:
    """(seconds to the first token, token ids)."""
    parts: tuple[Any, ...] = (TextPart(text),)
    if png is not None:
        parts = (MediaPart("image", blob=0), *parts)
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    request = ChatRequest((Message("user", parts),), sampling)
    start, first = time.perf_counter(), 0.0
    ids: list[int] = []
    for delta in local.chat(request, [png] if png is not None else []):
        first = first or (time.perf_counter() - start if delta.token_ids else 0.0)
        ids += delta.token_ids
    return first, ids


def together(local: LocalEnsemble, texts: list[str], tokens: int) -> float:
    """Tokens per second of all of them at once."""
    threads = [threading.Thread(target=ask, args=(local, text, None, tokens)) for text in texts]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(texts) * tokens / (time.perf_counter() - start)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="generate_cpu")
    args = parser.parse_args()
    settings = Settings(model=args.model, device=args.device)
    local = LocalEnsemble(settings, args.device)
    folder = find_checkpoint(settings).folder
    processor = transformers.AutoProcessor.from_pretrained(folder)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    reference = transformers.AutoModelForMultimodalLM.from_pretrained(folder, dtype=dtype).to(args.device).eval()

    def generate(texts: list[str]) -> tuple[float, list[list[int]]]:
        """(tokens per second without tokenising, token ids)."""
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "text", "text": text}]}], add_generation_prompt=True
            )
            for text in texts
        ]
        batch = processor(text=prompts, return_tensors="pt", padding=True).to(args.device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = reference.generate(
                **batch, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, use_cache=True
            )
        seconds = time.perf_counter() - start
        return out.shape[0] * args.tokens / seconds, out[:, batch["input_ids"].shape[1] :].tolist()

    # min_new_tokens keeps generate from ending early by forbidding the end token, so compare up to there
    eos = processor.tokenizer.eos_token_id
    for text in QUESTIONS[:4]:
        ours, theirs = ask(local, text, None, args.tokens)[1], generate([text])[1][0]
        until = ours.index(eos) if eos in ours else args.tokens
        if ours[:until] != theirs[:until]:
            raise SystemExit(f"the tokens differ for {text!r}: {ours} against {theirs}")
    together(local, QUESTIONS[:8], args.tokens)
    generate(QUESTIONS[:8])

    rates: dict[str, list[float]] = {"generate_1": [], "engine_1": [], "generate_8": [], "engine_8": []}
    for _ in range(args.rounds):
        rates["generate_1"].append(generate(QUESTIONS[:1])[0])
        rates["engine_1"].append(together(local, QUESTIONS[:1], args.tokens))
        rates["generate_8"].append(generate(QUESTIONS[:8])[0])
        rates["engine_8"].append(together(local, QUESTIONS[:8], args.tokens))

    png = picture(1)
    ask(local, "Look.", png, 2)
    ttft: dict[str, list[float]] = {"text": [], "cached_picture": [], "new_picture": []}
    for i, question in enumerate(QUESTIONS):
        ttft["text"].append(ask(local, f"{i} {question}", None, 2)[0])
        ttft["cached_picture"].append(ask(local, f"{i} {question}", png, 2)[0])
        ttft["new_picture"].append(ask(local, f"{i} {question}", picture(100 + i), 2)[0])
    local.close()
    middle = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        "engine_1_over_generate_1": np.median(np.divide(rates["engine_1"], rates["generate_1"])),
        "engine_8_over_generate_1": np.median(np.divide(rates["engine_8"], rates["generate_1"])),
        "engine_8_over_generate_8": np.median(np.divide(rates["engine_8"], rates["generate_8"])),
    }
    save(
        args.name,
        sys.argv,
        {
            "tokens_per_s_median": {name: round(value, 1) for name, value in middle.items()},
            "ratios_median": {name: round(float(value), 2) for name, value in ratios.items()},
            "ttft_ms_median": {name: round(1000 * statistics.median(v), 2) for name, v in ttft.items()},
        },
    )


if __name__ == "__main__":
    main()
