"""Check that training sees what serving sees: the batched forward pass against transformers' processor and model.

python -m triptych.python_models.builtin.training.check
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"
# (torch and transformers leave many methods untyped)

import random
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import batches, model, train


def compare(maker: batches.Maker, network: Any, processor: Any, kind: str, seed: int) -> None:
    """Make a small batch, run it both ways, row by row, and print the largest differences."""
    batch = maker.make(kind, seed, 1.0, 0.01)
    with torch.no_grad():
        states, _ = train.forward(network, batch, "cpu", augment=False)
        ours = network.lm_head(states)
    worst = 0.0
    for i in range(min(3, len(batch.ids))):
        length = int((batch.ids[i] != processor.tokenizer.pad_token_id).sum())
        text = processor.tokenizer.decode(batch.ids[i, :length], skip_special_tokens=False)
        media: dict[str, Any] = {}
        for token in ("image", "video", "audio"):
            pad = f"<|{token}_pad|>"
            while pad + pad in text:
                text = text.replace(pad + pad, pad)
        if kind in ("picture", "pair"):
            media["images"] = [Image.fromarray(m[i, 0, ..., :3]) for m in batch.media]
        if kind == "clip":
            rate = 2 / batch.extra["seconds"][i]
            size = dict(processor.video_processor.size)
            media["videos"] = [batch.media[0][i, ..., :3].transpose(0, 3, 1, 2)]
            media["videos_kwargs"] = {"size": size, "do_sample_frames": False, "fps": rate}
        if kind == "sound":
            media["audio"] = [batch.media[0][i]]
        inputs = processor(text=[text], return_tensors="pt", **media)
        for name in ("video_second_per_grid",):
            if name in inputs:
                inputs[name] = torch.as_tensor(np.array(inputs[name]), dtype=torch.float32)
        if not torch.equal(inputs["input_ids"][0], torch.as_tensor(batch.ids[i, :length])):
            raise SystemExit(f"{kind}: the token rows differ")
        network.model.rope_deltas = None
        with torch.no_grad():
            theirs = network(**inputs).logits[0]
        lengths = inputs["feature_attention_mask"].sum(-1) if kind == "sound" else None
        positions = network.get_rope_index(
            inputs["input_ids"], inputs.get("image_grid_thw"), inputs.get("video_grid_thw"),
            inputs["attention_mask"], False,
            lengths, inputs.get("video_second_per_grid"),
        )[0][:, 0]  # fmt: skip
        if not torch.equal(positions, torch.as_tensor(batch.positions[:, i, :length])):
            raise SystemExit(f"{kind}: the positions differ")
        worst = max(worst, float((ours[i, :length] - theirs).abs().max()))
    largest = float(theirs.abs().max())
    print(f"{kind}: ids and positions equal, logits differ by at most {worst:.1e} (largest {largest:.2f})")
    if worst > 1e-3:
        raise SystemExit(f"{kind}: the forward passes differ")


def main() -> None:
    """Compare every kind of batch on a random model."""
    tokenizer = model.make_tokenizer()
    network = model.make_model(tokenizer).eval()
    maker = batches.Maker(tokenizer, batches.voices())
    for kind in ("picture", "pair", "clip", "sound", "talk"):
        for seed in random.Random(kind).sample(range(1000), 3):
            compare(maker, network, model.make_processor(tokenizer), kind, seed)


if __name__ == "__main__":
    main()
