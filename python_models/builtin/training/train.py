"""Train the built-in model from scratch on synthetic data, on one GPU in about a quarter of an hour.

    python -m triptych.python_models.builtin.training.train --out run --compile

Data come from worker processes that draw without end. Beside the answers, linear heads that are not part of the model
learn what each patch shows (shape, colour, centre, character), in which part of the picture it lies, and which digit or
tone each sound token holds: without them shapes and places take many times the steps and printed text does not start to
be learnt.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"
# (torch and transformers leave many methods untyped)

import argparse
import math
import os
import queue
import random
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from . import batches, model
from .batches import Batch, Maker
from .data import CHARACTERS, COLOURS, SHAPES
from .model import Network
from .speech import Array

KINDS = ("picture", "clip", "sound", "pair", "talk")
CELL_SPLIT = (1 + len(SHAPES), 1 + len(COLOURS), 2)
GLYPHS = 1 + len(CHARACTERS)


class Heads(nn.Module):
    """Linear heads used in training alone: what the patches of a token show, and what a sound token holds."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.cells = nn.Linear(width, 4 * sum(CELL_SPLIT))
        self.glyphs = nn.Linear(width, 16 * GLYPHS)
        self.spans = nn.Linear(width, batches.SOUND_LABELS)
        self.regions = nn.Linear(width, 9)

    def picture_loss(
        self, tokens: Tensor, cells: Tensor, glyphs: Tensor, watch: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens [batch, n, 256], labels [batch, n, 4, 3] and [batch, n, 16] to a loss and its parts."""
        parts = self.cells(tokens).unflatten(-1, (4, -1)).split(CELL_SPLIT, -1)
        losses = {}
        for i, (name, scores) in enumerate(zip(("shape", "tint", "centre"), parts, strict=True)):
            weight = torch.ones(scores.shape[-1], device=scores.device)
            weight[0] = 0.1 if name == "centre" else 0.4
            losses[name] = F.cross_entropy(scores.float().flatten(0, 2), cells[..., i].flatten(), weight)
        weight = torch.ones(GLYPHS, device=tokens.device)
        weight[0] = 0.1
        scores = self.glyphs(tokens).unflatten(-1, (16, GLYPHS)).float().flatten(0, 2)
        losses["glyph"] = F.cross_entropy(scores, glyphs.flatten(), weight)
        loss = losses["shape"] + losses["tint"] + 0.5 * losses["centre"] + losses["glyph"]
        if watch and glyphs.any():
            hit = (scores.argmax(-1) == glyphs.flatten())[glyphs.flatten() > 0]
            losses["glyph hit"] = hit.float().mean()
        return loss, losses


def augment_pixels(pixels: Tensor) -> Tensor:
    """uint8 [n, frames, h, w, 3 or 4] to float RGB: noise behind what is drawn, light, blur and pixel noise."""
    rgb = pixels[..., :3].float()
    count, frames, height, width, _ = rgb.shape
    device = rgb.device
    some = lambda share: (torch.rand(count, 1, 1, 1, 1, device=device) < share).float()  # noqa: E731
    if pixels.shape[-1] == 4:
        grain = random.choice((1, 1, 2, 4, 8, 32))
        field = torch.randn(count, 3, height // grain + 2, width // grain + 2, device=device)
        grey = some(0.5).flatten(1)[..., None, None]
        field = grey * field[:, :1] + (1 - grey) * field
        if grain > 1:
            field = F.interpolate(field, scale_factor=grain, mode="bicubic")
        field = field[:, :, :height, :width].permute(0, 2, 3, 1)[:, None]
        amount = some(0.5) * (4 + 24 * torch.rand(count, 1, 1, 1, 1, device=device))
        rgb = rgb + field * amount * (1 - pixels[..., 3:].float() / 255)
    rgb = rgb * (1 + 0.12 * (2 * torch.rand(count, 1, 1, 1, 1, device=device) - 1))
    if random.random() < 0.25:
        planes = rgb.permute(0, 1, 4, 2, 3).flatten(0, 1)
        smooth = (
            F.avg_pool2d(planes, 3, 1, 1, count_include_pad=False).unflatten(0, (count, frames)).permute(0, 1, 3, 4, 2)
        )
        blend = torch.rand(count, 1, 1, 1, 1, device=device) * 0.7
        rgb = rgb * (1 - blend) + smooth * blend
    rgb = rgb + torch.randn_like(rgb) * some(0.4) * 8 * torch.rand(count, 1, 1, 1, 1, device=device)
    return rgb.clamp(0, 255).round()


def put(array: Array | Tensor | None, device: str) -> Tensor:
    """A tensor on the device."""
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(device, non_blocking=True)


def forward(network: Network, batch: Batch, device: str, augment: bool = True) -> tuple[Tensor, list[Tensor]]:
    """States [n, t, 256] of a batch and the tokens [n, m, 256] of each of its media."""
    tokens = []
    visual, audio, _ = model.parts(network)
    for media in batch.media:
        x = put(media, device)
        if batch.kind == "sound":
            tokens.append(model.hear(audio, model.log_mel(x)))
        else:
            patches, grid = model.patchify(augment_pixels(x) if augment else x[..., :3].float())
            tokens.append(model.see(visual, patches, grid))
    rows = torch.cat([t.flatten(0, 1) for t in tokens]) if tokens else None
    where = torch.cat([put(w, device) for w in batch.where]) if tokens else None
    states = model.read(network, put(batch.ids, device), put(batch.positions, device), rows, where)
    return states, tokens


def region_of(height: int, width: int, device: str) -> Tensor:
    """Which of nine regions each token of a picture lies in: [height * width]."""
    rows = ((torch.arange(height, device=device) + 0.5) * 3 / height).long()
    columns = ((torch.arange(width, device=device) + 0.5) * 3 / width).long()
    return (3 * rows[:, None] + columns).flatten()


def losses(
    network: Network, heads: Heads, batch: Batch, device: str, watch: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and, to watch, its parts and which answer tokens are right."""
    states, tokens = forward(network, batch, device)
    target = put(batch.target, device)
    logits = network.lm_head(states.flatten(0, 1)[put(batch.asked, device)]).float()
    answer = F.cross_entropy(logits, target)
    loss, stats = answer, {batch.kind: answer}
    if batch.cells is not None:
        labels = put(batch.cells, device).long(), put(batch.glyphs, device).long()
        dense, shown = heads.picture_loss(tokens[0], *labels, watch)
        height, width = (side // model.PATCH // model.MERGE for side in batch.media[0].shape[2:4])
        region = region_of(height, width, device)
        scores = heads.regions(tokens[0]).float()
        stats["region"] = F.cross_entropy(scores.flatten(0, 1), region.repeat(len(scores)))
        loss = loss + dense + 0.5 * stats["region"]
        stats |= shown
    if batch.spans is not None:
        stats["span"] = F.cross_entropy(
            heads.spans(tokens[0]).float().flatten(0, 1), put(batch.spans, device).flatten()
        )
        loss = loss + 0.5 * stats["span"]
    if watch:
        stats["right"] = logits.argmax(-1) == target
    return loss, stats


def answers_right(batch: Batch, right: Tensor) -> list[tuple[str, bool]]:
    """(task, whole answer right) of every turn, each token with the answer so far given."""
    table = np.ones(batch.ids.shape, bool)
    table.flat[np.asarray(batch.asked)] = right.cpu().numpy()
    found = []
    for i, answers in enumerate(batch.tasks):
        for task, first, last in answers:
            found.append((f"{batch.kind}/{task}", bool(table[i, first - 1 : last - 1].all())))
    return found


# ---- data workers ----


def work(kinds: tuple[str, ...], seed: int, progress: Any, share: float, folder: str, queues: dict[str, Any]) -> None:
    """Make batches of the kinds in turn, for ever."""
    torch.set_num_threads(1)
    try:
        maker = Maker(model.load_tokenizer(Path(folder)), batches.voices())
        rng = random.Random(seed)
        while True:
            kind = rng.choice(kinds)
            queues[kind].put(to_tensors(maker.make(kind, rng.getrandbits(48), progress.value, share)))
    except Exception:
        traceback.print_exc()
        raise


def to_tensors(batch: Batch) -> Batch:
    """Arrays as shared tensors, which cross processes without a copy through a pipe."""
    batch.media = [torch.from_numpy(np.ascontiguousarray(m)) for m in batch.media]
    return batch


def pinned(batch: Batch) -> Batch:
    """All arrays as tensors in pinned memory, where there is a GPU."""
    pin = (lambda t: t.pin_memory()) if torch.cuda.is_available() else (lambda t: t)
    for name in ("ids", "positions", "asked", "target", "cells", "glyphs", "spans"):
        if (array := getattr(batch, name)) is not None:
            setattr(batch, name, pin(torch.from_numpy(np.ascontiguousarray(array))))
    batch.media = [pin(m) for m in batch.media]
    batch.where = [pin(torch.from_numpy(w)) for w in batch.where]
    return batch


class Feed:
    """Worker processes and one queue of batches for each kind."""

    def __init__(self, workers: int, share: float, folder: str, seed: int, only: tuple[str, ...] = ()):
        context = torch.multiprocessing.get_context("spawn")
        self.progress = context.Value("d", 0.0)
        self.queues = {kind: context.Queue(6) for kind in KINDS}
        shares = {"picture": 0.62, "clip": 0.16, "sound": 0.08, "pair": 0.14}
        plan: list[tuple[str, ...]] = []
        for kind, part in shares.items():
            plan += [(kind,)] * max(1, round(part * (workers - 1)))
        plan = [only] * workers if only else [*plan[: workers - 1], ("talk",)]
        self.processes = []
        for i, kinds in enumerate(plan):
            arguments = (kinds, seed + 7919 * i, self.progress, share, folder, self.queues)
            self.processes.append(context.Process(target=work, args=arguments, daemon=True))
            self.processes[-1].start()
        self.ready: dict[str, queue.Queue[Batch]] = {kind: queue.Queue(2) for kind in KINDS}
        for kind in KINDS:
            threading.Thread(target=self._pull, args=(kind,), daemon=True).start()

    def _pull(self, kind: str) -> None:
        while True:
            self.ready[kind].put(pinned(self.queues[kind].get()))

    def get(self, kind: str) -> Batch:
        """The next batch of a kind."""
        return self.ready[kind].get()

    def close(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.kill()


# ---- the run ----


def rate(done: float, step: int, peak: float, warm: int) -> float:
    """Learning rate: warm-up, level, and from half of the run a cosine down to 2 %."""
    fall = 1.0 if done < 0.5 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, (done - 0.5) / 0.5)))
    return peak * min(1, (step + 1) / warm) * fall


def choose(rng: random.Random, done: float) -> list[str]:
    """The kinds of batches of one step; sound and clips are learnt early and then kept warm."""
    side = (0.36, 0.34, 0.2, 0.1) if done < 0.4 else (0.34, 0.22, 0.32, 0.12)
    return ["picture", "picture", rng.choices(("clip", "sound", "pair", "talk"), side)[0]]


class Log:
    """Means between two printed lines."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """One value."""
        self.sums.setdefault(name, []).append(value)

    def flush(self) -> str:
        """The means, and start over; tasks are in per cent."""
        means = {k: float(np.mean(v)) for k, v in sorted(self.sums.items())}
        self.sums.clear()
        return " ".join(f"{k}={100 * v:.0f}%" if "/" in k or "hit" in k else f"{k}={v:.3f}" for k, v in means.items())


def save_all(network: Network, heads: Heads, tokenizer: Any, folder: Path, note: str) -> None:
    """The checkpoint in pieces of under 15 MB, and the heads, so that a run can go on from them."""
    part = folder.with_name(folder.name + ".part")
    model.save(network, tokenizer, part, "14MB")
    torch.save(heads.state_dict(), part / "heads.pt")
    (part / "note.txt").write_text(note + "\n")
    if folder.exists():
        for old in folder.iterdir():
            old.unlink()
        folder.rmdir()
    part.rename(folder)


def main() -> None:
    """Train for a number of seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--resume", type=Path, help="folder of a saved checkpoint")
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--begin", type=float, default=0.0, help="share of the schedule that is done already")
    parser.add_argument("--end", type=float, default=1.0, help="share of the schedule at which to stop")
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--warm", type=int, default=300)
    parser.add_argument("--share", type=float, default=1.0, help="batch sizes relative to the default")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--kinds", default="", help="comma-separated: train on these kinds alone")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=200, help="steps between two lines of the log")
    options = parser.parse_args()
    device, cuda = options.device, options.device == "cuda"
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(4 if cuda else torch.get_num_threads())
    options.out.mkdir(parents=True, exist_ok=True)

    tokenizer = model.make_tokenizer()
    tokenizer.save_pretrained(options.out / "tokenizer")
    only = tuple(filter(None, options.kinds.split(",")))
    feed = Feed(options.workers, options.share, str(options.out / "tokenizer"), options.seed, only)
    network: Network = model.make_model(tokenizer, options.seed)
    heads = Heads()
    if options.resume:
        network = type(network).from_pretrained(options.resume, dtype=torch.float32)
        heads.load_state_dict(torch.load(options.resume / "heads.pt"), strict=True)
    network, heads = network.to(device).train(), heads.to(device)
    if options.compile:
        torch._dynamo.config.recompile_limit = 64
        for name in ("vision_project", "vision_finish", "text_project", "text_finish"):
            setattr(model, name, torch.compile(getattr(model, name), dynamic=True))
    parameters = [p for p in [*network.parameters(), *heads.parameters()] if p.requires_grad]
    decay = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    optimizer: Any = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=cuda)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters on {device}", flush=True)

    rng, log = random.Random(options.seed), Log()
    start = saved = time.time()
    step = bad = samples = patches = 0
    waited = 0.0
    done = options.begin
    while done < options.end:
        done = options.begin + (time.time() - start) / options.seconds
        feed.progress.value = done
        for group in optimizer.param_groups:
            group["lr"] = rate(done, step, options.rate, options.warm)
        watch = step % 10 == 0
        for kind in [rng.choice(only)] if only else choose(rng, done):
            before = time.time()
            batch = feed.get(kind)
            waited += time.time() - before
            samples += len(batch.ids)
            patches += sum(m[..., 0].numel() // 196 for m in batch.media if m.ndim == 5)
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                loss, stats = losses(network, heads, batch, device, watch)
            (loss / 3).backward()
            if watch:
                for task, ok in answers_right(batch, stats.pop("right")):
                    log.add(task, ok)
                for name, value in stats.items():
                    log.add(name, float(value))
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if watch and not math.isfinite(float(norm)):
            bad += 1
            print(f"step {step}: gradient not finite ({kind}, {[m.shape for m in batch.media]})", flush=True)
            if bad > 20:
                raise SystemExit("too many steps with a gradient that is not finite")
        if cuda:  # the fused optimizer skips a step whose gradient is not finite
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        now = time.time()
        if step % options.every == 0 or step in (10, 50):
            spent = now - start
            print(
                f"{spent:.0f}s step {step} done {done:.3f} {step / spent:.2f}/s {samples / spent:.0f} samples/s "
                f"{patches / spent / 1e6:.2f} Mpatches/s waited {100 * waited / spent:.0f}% norm {float(norm):.2f}",
                log.flush(),
                flush=True,
            )
        if now - saved > 120:
            saved = now
            save_all(network, heads, tokenizer, options.out / "checkpoint", f"step {step} done {done:.4f}")
    save_all(network, heads, tokenizer, options.out / "checkpoint", f"step {step} done {done:.4f} final")
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
    print(
        f"END step {step} samples {samples} seconds {time.time() - start:.0f} memory {memory:.1f} GiB {log.flush()}",
        flush=True,
    )
    feed.close()


if __name__ == "__main__":
    main()
    os._exit(0)
