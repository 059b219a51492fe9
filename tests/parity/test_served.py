"""Through the real server: every family behind tritonserver, asked over gRPC, beside transformers' ``generate``.

One server for each family; what one engine step computes is so little there that every prompt is computed in chunks.
"""

from __future__ import annotations

import io
import time
import urllib.request
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from triptych.client.launcher import TritonServer, find_server
from triptych.client.sdk import Client
from triptych.python_models.contract.delta import Delta
from triptych.python_models.contract.settings import Settings
from triptych.python_models.media.audio import read_with_soundfile, to_audio
from triptych.python_models.media.image import decode_image
from triptych.python_models.media.types import Medium, Video
from triptych.python_models.media.video import decode_video, frame_indices

NEW_TOKENS = 10
TOP = 4
CHUNK = 16
# generous: two servers load at once, maybe on a machine that does other things too
LOAD_S = 400.0
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SIZES = {"image": ((56, 40), (90, 33)), "audio": (0.75, 1.3), "video": (16, 40)}


class Served:
    """A server with one family's checkpoint, and makers of encoded media."""

    def __init__(self, parts: Any, server: TritonServer, client: Client, folder: Path) -> None:
        self.parts = parts
        self.server = server
        self.client = client
        self.folder = folder
        self.files: dict[str, bytes] = {}

    def medium(self, modality: str, seed: int) -> Medium:
        """An encoded medium, and what the server is to decode from it; the same seed gives the same medium.

        Odd seeds give media of one size, even ones of another.
        """
        size = SIZES[modality][seed % 2]
        name = f"{modality}-{seed}"
        if modality == "image":
            data = picture(seed, *size)
            decoded: Any = decode_image(data, 10**8)
        elif modality == "audio":
            data = sound(seed, size, self.parts.preprocessor.sampling_rate)
            decoded = to_audio(*read_with_soundfile(data, 60.0), self.parts.preprocessor.sampling_rate)
        else:
            data = film(seed, size)
            decoded = self._video(data, name)
        self.files[name] = data
        return Medium(modality, decoded, name, "messages[0]")

    def _video(self, data: bytes, name: str) -> Video:
        path = self.folder / f"{name}.mp4"
        path.write_bytes(data)
        sampling = self.parts.preprocessor.frame_sampling
        frames: list[Any] = []

        def allocate(shape: tuple[int, ...]) -> Any:
            frames.append(np.empty(shape, dtype=np.uint8))
            return frames[-1]

        info = decode_video(str(path), sampling, 10**8, 768, allocate)
        indices = frame_indices(info, sampling, 768)
        rate = len(indices) / info.duration_s
        return Video(frames[0], rate, info.duration_s, info.source_fps, tuple(indices), info.total_frames)

    def ask(self, chat: Any, max_tokens: int = NEW_TOKENS) -> Any:
        """Start a request; its stream of deltas."""
        messages = []
        media = [self.files[medium.digest] for medium in chat.media]
        for message in chat.messages:
            content: Any = [
                {"type": "text", "text": part.text}
                if hasattr(part, "text")
                else {"type": part.modality, part.modality: media[part.blob]}
                for part in message.parts
            ]
            messages.append({"role": message.role, "content": content[0]["text"] if message.plain else content})
        asked = {"temperature": 0.0, "max_tokens": max_tokens, "logprobs": True, "top_logprobs": TOP}
        return self.client.stream_chat(messages, **asked)

    def expect(self, *chats: Any) -> None:
        """All at once, each answered as transformers does."""
        streams = [self.ask(chat) for chat in chats]
        for stream, chat in zip(streams, chats, strict=True):
            compare(list(stream), *self.reference(chat), self.parts.decoder.eos_token_ids)

    @torch.no_grad()
    def reference(self, chat: Any) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens of ``generate``, and the log probabilities [n, V] they were chosen from."""
        inputs = self.parts.reference_inputs(chat)
        # left over from the call before
        self.parts.whole.base_model.rope_deltas = None
        out = self.parts.whole.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, torch.cat(list(out.logits)).float().log_softmax(-1)

    def metric(self, name: str, stage: str) -> float:
        """A sample of the server's /metrics; 0 where there is none yet."""
        with NO_PROXY.open(self.server.metrics_url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and f'stage="{stage}"' in line)


def compare(deltas: Sequence[Delta], tokens: list[int], logprobs: torch.Tensor, ends: frozenset[int]) -> None:
    found = [token for delta in deltas for token in delta.token_ids]
    assert without_end(found, ends) == without_end(tokens, ends)
    chosen = [one for delta in deltas for one in delta.logprobs]
    assert len(chosen) == len(found) > 0
    for step, one in enumerate(chosen):
        own = logprobs[step]
        assert one.logprob == pytest.approx(float(own[one.token_id]), abs=1e-3)
        assert [top[2] for top in one.top] == pytest.approx(own.topk(TOP).values.tolist(), abs=1e-3)
        assert [top[2] for top in one.top] == pytest.approx([float(own[top[0]]) for top in one.top], abs=1e-3)


def without_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def picture(seed: int, width: int, height: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    PILImage.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def sound(seed: int, seconds: float, rate: int) -> bytes:
    samples = np.random.default_rng(seed).integers(-3000, 3000, int(seconds * rate), dtype=np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def film(seed: int, frames: int) -> bytes:
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


@pytest.fixture(scope="module")
def served(parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    settings = Settings(
        model=str(parts.folder),
        device="cpu",
        kv_cache_tokens=4096,
        mm_cache_size_mb=16,
        chunked_prefill_size=CHUNK,
        torch_threads=1,
    )
    with TritonServer(find_server(), settings, log=folder / "server.log") as server:
        server.wait_ready(LOAD_S, lambda said: None)
        with Client(server.grpc_url) as client:
            yield Served(parts, server, client, folder)


def test_each_modality(served: Served, modality: str) -> None:
    make = served.parts.make
    if modality == "text":
        served.expect(make.chat("hello world, what is shown?"))
        served.expect(
            make.turns(("user", "which numbers? 0123"), ("assistant", "many"), ("user", "which colours? " * 6))
        )
        return
    served.expect(make.chat(served.medium(modality, 1), "describe this"))
    served.expect(make.chat("first ", served.medium(modality, 2), "then"))
    if f"two_{modality}s" not in served.parts.without and "two" not in served.parts.without:
        served.expect(make.chat(served.medium(modality, 3), " and ", served.medium(modality, 5), "which is larger?"))


def test_a_second_turn(served: Served, medium_kind: str) -> None:
    make = served.parts.make
    first = [("system", "describe in detail"), ("user", served.medium(medium_kind, 11), "what is this?")]
    served.expect(make.turns(*first))
    alone = {"two", f"two_{medium_kind}s"} & set(served.parts.without)
    second = [] if alone else [served.medium(medium_kind, 13)]
    served.expect(make.turns(*first, ("assistant", "a lazy dog"), ("user", "and this?", *second, "how many?")))


def test_mixed_requests_at_once(served: Served) -> None:
    make = served.parts.make
    chats = [make.chat("hi"), make.chat("describe the quick brown fox in detail please! " * 3)]
    for modality in served.parts.modalities:
        chats += [make.chat(served.medium(modality, seed), "describe" * seed) for seed in (7, 8)]
        chats.append(make.chat("numbers 0123456789 ", served.medium(modality, 7), "transcribe"))
    served.expect(*chats)


def test_a_medium_again_comes_from_the_cache(served: Served, medium_kind: str) -> None:
    make = served.parts.make
    medium = served.medium(medium_kind, 9)
    stage = f"{served.parts.family.modality_encoders[medium_kind]}_encoder"
    served.expect(make.chat(medium, "describe"))
    hits, misses = (f"triptych_encoder_cache_{which}_total" for which in ("hits", "misses"))
    before = settled(lambda: (served.metric(hits, stage), served.metric(misses, stage)))
    served.expect(make.chat("look: ", medium, "what colours?"))
    wait_until(lambda: served.metric(hits, stage) == before[0] + 1)
    assert served.metric(misses, stage) == before[1]


def test_prompts_are_computed_in_chunks(served: Served) -> None:
    """The other tests of this file prove that this changes nothing."""
    steps = "triptych_engine_step_seconds_count"
    before = served.metric(steps, "language_model")
    chat = served.parts.make.chat("which numbers are shown here? 0123456789 " * 8)
    deltas = list(served.ask(chat, max_tokens=1))
    usage = deltas[-1].usage
    assert usage is not None
    assert usage.prompt_tokens - usage.cached_tokens > 3 * CHUNK
    wait_until(lambda: served.metric(steps, "language_model") >= before + 3)


def settled(read: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """Figures that have not changed for two seconds: what came before has been reported."""
    found, since = read(), time.monotonic()
    until = since + 30
    while time.monotonic() < since + 2:
        time.sleep(0.2)
        if (now := read()) != found:
            assert time.monotonic() < until
            found, since = now, time.monotonic()
    return found


def wait_until(reached: Callable[[], bool]) -> None:
    """Stages report their metrics now and then."""
    until = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.1)
