"""Stages in process beside the whole model of transformers, on the same checkpoint and the same media."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from triptych.python_models.builtin import checkpoint as builtin_checkpoint
from triptych.python_models.contract.errors import TriptychError
from triptych.python_models.contract.request import MediaPart, Message, TextPart
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.base import Decoder, Encoder, Prepared, Preprocessor
from triptych.python_models.families.registry import load_family
from triptych.python_models.media.types import Audio, Image, Medium, Video

NEW_TOKENS = 10


@dataclass(frozen=True)
class Chat:
    """A conversation with its decoded media."""

    messages: tuple[Message, ...]
    media: tuple[Medium, ...] = ()


class ChatMaker:
    """Makes conversations with random media, always the same for the same seed."""

    def __init__(self, sampling_rate: int, modalities: Sequence[str], system: bool) -> None:
        """Args: of sounds, in Hz; what the family takes; its template has a system role."""
        self.sampling_rate = sampling_rate
        self.modalities = modalities
        self.system = system

    def any(self, seed: int) -> Medium:
        """A medium of the family's first modality."""
        make: Callable[[int], Medium] = getattr(self, self.modalities[0])
        return make(seed)

    def each(self, seed: int) -> list[Medium]:
        """A medium of each modality."""
        return [getattr(self, modality)(seed + k) for k, modality in enumerate(self.modalities)]

    def image(self, seed: int, width: int = 56, height: int = 40) -> Medium:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Medium("image", Image(PILImage.fromarray(pixels)), f"image-{seed}-{width}x{height}", "messages[0]")

    def video(self, seed: int, frames: int = 4, duration: float = 2.0) -> Medium:
        pixels = np.random.default_rng(seed).integers(0, 256, (frames, 48, 64, 3), dtype=np.uint8)
        video = Video(
            pixels,
            frames / duration,
            duration,
            16.0,
            tuple(range(0, int(duration * 16), int(duration * 16) // frames))[:frames],
            int(duration * 16),
        )
        return Medium("video", video, f"video-{seed}-{frames}-{duration}", "messages[0]")

    def audio(self, seed: int, seconds: float = 0.75) -> Medium:
        count = int(seconds * self.sampling_rate)
        samples = (np.random.default_rng(seed).standard_normal(count) * 0.1).astype(np.float32)
        return Medium("audio", Audio(samples, self.sampling_rate), f"audio-{seed}-{seconds}", "messages[0]")

    def chat(self, *parts: Medium | str) -> Chat:
        """One user turn."""
        return self.turns(("user", *parts))

    def turns(self, *turns: tuple[Any, ...]) -> Chat:
        """(role, part, part ...) per turn; a system turn is left out where the template has none."""
        messages = []
        media: list[Medium] = []
        for role, *parts in turns if self.system else [turn for turn in turns if turn[0] != "system"]:
            content: list[TextPart | MediaPart] = []
            for part in parts:
                if isinstance(part, str):
                    content.append(TextPart(part))
                else:
                    content.append(MediaPart(part.modality, blob=len(media)))
                    media.append(part)
            messages.append(Message(role, tuple(content), plain=len(parts) == 1 and isinstance(parts[0], str)))
        return Chat(tuple(messages), tuple(media))


class Parts:
    """A checkpoint, taken apart and whole.

    Attributes:
        without: see ``Tiny.without``.
    """

    def __init__(self, folder: Path, tiny: Any = None) -> None:
        """Args: the checkpoint; its :class:`tiny.common.Tiny` (None: the built-in model)."""
        self.folder = folder
        self.tiny = tiny
        self.modalities: tuple[str, ...] = ("image", "video", "audio") if tiny is None else tiny.modalities
        self.without = {} if tiny is None else tiny.without
        self.settings = Settings(model=str(folder), kv_cache_tokens=4096, mm_cache_size_mb=16)
        self.family = load_family(self.settings)

    @cached_property
    def preprocessor(self) -> Preprocessor:
        return self.family.load_preprocessor()

    @cached_property
    def encoders(self) -> dict[str, Encoder]:
        return {name: self.family.load_encoder(name, "cpu", torch.float32) for name in self.family.encoders}

    @cached_property
    def decoder(self) -> Decoder:
        return self.family.load_decoder("cpu", torch.float32)

    @cached_property
    def make(self) -> ChatMaker:
        return ChatMaker(self.preprocessor.sampling_rate, self.modalities, self.tiny is None or self.tiny.system)

    @cached_property
    def _reference(self) -> tuple[Any, Any]:
        """The whole model and its processor (of text alone, its tokenizer), untouched by ours.

        Beside a checkpoint in another format than transformers' lies a folder ``whole`` in that one.
        """
        import transformers

        if self.tiny is not None and self.tiny.reference is not None:
            found: tuple[Any, Any] = self.tiny.reference(self.folder)
            return found
        folder = self.folder / "whole" if (self.folder / "whole").is_dir() else self.folder
        (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
        model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = (folder / "tokenizer_config.json").is_file()
        return model, transformers.AutoProcessor.from_pretrained(folder if tokenizer else self.folder)

    @property
    def whole(self) -> Any:
        """transformers' own model."""
        return self._reference[0]

    @property
    def processor(self) -> Any:
        """transformers' own processor."""
        return self._reference[1]

    # --- the reference

    def reference_inputs(self, chat: Chat) -> dict[str, Any]:
        """What transformers' processor makes of a conversation."""
        from transformers.video_utils import VideoMetadata

        conversation = []
        for message in chat.messages:
            content: Any = [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": part.modality}
                for part in message.parts
            ]
            conversation.append({"role": message.role, "content": content[0]["text"] if message.plain else content})
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        if self.tiny is not None and self.tiny.inputs is not None:
            grouped: dict[str, list[Any]] = {}
            for medium in chat.media:
                grouped.setdefault(medium.modality, []).append(medium.data)
            return dict(self.tiny.inputs(self.processor, text, grouped))
        arguments: dict[str, Any] = {}
        data = [medium.data for medium in chat.media]
        if images := [d.pixels for d in data if isinstance(d, Image)]:
            arguments["images"] = images
        if videos := [d for d in data if isinstance(d, Video)]:
            arguments["videos"] = [v.frames for v in videos]
            arguments["videos_kwargs"] = {
                "do_sample_frames": False,
                "video_metadata": [
                    VideoMetadata(
                        total_num_frames=v.total_frames,
                        fps=v.source_fps,
                        duration=v.duration_s,
                        frames_indices=list(v.indices),
                        height=v.frames.shape[1],
                        width=v.frames.shape[2],
                    )
                    for v in videos
                ],
            }
            if "audio" in self.preprocessor.modalities and "omni" in type(self.processor).__name__.lower():
                # The omni processor takes one frame rate a call, and a size of its own unless told.
                size = self.processor.video_processor.size
                arguments["videos_kwargs"] |= {"fps": videos[0].sampled_fps, "size": dict(size)}
        if sounds := [d.samples for d in data if isinstance(d, Audio)]:
            arguments["audio"] = sounds
        # as apply_chat_template(tokenize=True) does it: nothing begins twice
        bos = getattr(self.processor, "tokenizer", self.processor).bos_token
        if bos is not None and text.startswith(bos):
            arguments["add_special_tokens"] = False
        try:
            return dict(self.processor(text=[text], return_tensors="pt", **arguments))
        except (TypeError, ValueError):
            if chat.media:
                raise
            # some processors want a medium with every text
            return dict(self.processor.tokenizer([text], return_tensors="pt", **arguments))

    def reference_tokens(self, chat: Chat, new_tokens: int = NEW_TOKENS) -> list[int]:
        """What transformers' ``generate`` answers, greedily."""
        inputs = self.reference_inputs(chat)
        # Left over from the call before.
        self.whole.base_model.rope_deltas = None
        with torch.no_grad():
            out = self.whole.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        tokens: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    # --- the stages

    def prepare(self, chat: Chat) -> Prepared:
        return self.preprocessor.prepare(chat.messages, chat.media)

    def encode(self, prepared: Prepared) -> dict[str, torch.Tensor]:
        """Encoder -> rows of all its items."""
        return {name: torch.cat(self.encoders[name].encode(items)) for name, items in prepared.features.items()}

    def splice(self, prepared: Prepared) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Token embeddings with the media rows in their places [L, H]; the same of deepstack, zeros elsewhere."""
        ids = torch.from_numpy(prepared.input_ids.astype(np.int64))
        rows = self.encode(prepared)
        is_media = torch.zeros(len(ids), dtype=torch.bool)
        used = dict.fromkeys(rows, 0)
        places = []
        for item in prepared.items:
            if item.cross is not None:
                continue
            index = torch.cat([torch.arange(start, end) for start, end in item.spans])
            is_media[index] = True
            places.append((index, rows[item.encoder][used[item.encoder] : used[item.encoder] + item.num_rows]))
            used[item.encoder] += item.num_rows
        embeddings = self.decoder.embed(ids, is_media).clone()
        deep: dict[int, torch.Tensor] = {}
        for index, own in places:
            embeddings[index], *deeper = own.split(embeddings.shape[1], dim=1)
            for level, part in enumerate(deeper):
                deep.setdefault(level, torch.zeros_like(embeddings))[index] = part
        return embeddings, list(deep.values())

    @torch.no_grad()
    def logits(self, prepared: Prepared, answer: Sequence[int] = ()) -> torch.Tensor:
        """Logits [L + len(answer), V] of the decoder alone."""
        embeddings, deep = self.splice(prepared)
        position_ids = torch.from_numpy(prepared.position_ids.astype(np.int64))
        if answer:
            ids = torch.tensor(answer)
            embeddings = torch.cat([embeddings, self.decoder.embed(ids, torch.zeros(len(ids), dtype=torch.bool))])
            new = torch.arange(len(answer)) + len(prepared.input_ids)
            new = (new * self.decoder.position_step + prepared.rope_delta).expand(len(position_ids), -1)
            position_ids = torch.cat([position_ids, new], dim=1)
        extra: dict[str, Any] = {}
        if deep:
            in_prompt = torch.arange(len(embeddings))[None] < len(prepared.input_ids)
            extra = {"visual_pos_masks": in_prompt, "deepstack_visual_embeds": deep}
        if any(item.cross is not None for item in prepared.items):
            extra = self._across(prepared, len(embeddings))
        if self.decoder.token_arguments is not None:
            extra |= self.decoder.token_arguments(torch.tensor([*prepared.input_ids.tolist(), *answer]))
        for name, later in self.decoder.token_extras.items():
            given = prepared.extras.get(name, later)
            values = given if isinstance(given, list) else [given] * len(prepared.input_ids)
            values = values + [values[-1] if later is None else later] * len(answer)
            extra[name] = torch.tensor(values)[None]
        hidden = self.decoder.text_model(
            inputs_embeds=embeddings[None],
            position_ids=position_ids[:, None] if len(position_ids) > 1 else position_ids,
            attention_mask=self._masks(prepared, len(embeddings)) if self.decoder.bidirectional else None,
            use_cache=False,
            **extra,
        ).last_hidden_state
        out: torch.Tensor = self.decoder.lm_head(hidden[0])
        return out

    def _across(self, prepared: Prepared, length: int) -> dict[str, torch.Tensor]:
        """What transformers' cross-attention layers take."""
        states = torch.cat(list(self.encode(prepared).values()))
        seen = torch.zeros(length, len(states))
        first = 0
        for item in prepared.items:
            assert item.cross is not None
            start, end = item.cross.tokens
            seen[start : length if end == len(prepared.input_ids) else end, first : first + item.cross.visible] = 1
            first += item.cross.rows
        any_seen = seen.any(-1, keepdim=True).float()
        mask = (1 - seen) * torch.finfo(torch.float32).min * any_seen
        return {
            "cross_attention_states": states[None],
            "cross_attention_mask": mask[None, None],
            "full_text_row_masked_out_mask": any_seen[None, None],
        }

    def _masks(self, prepared: Prepared, length: int) -> dict[str, torch.Tensor]:
        """Type of layer -> what its tokens see, bool [1, 1, length, length], where media attend both ways."""
        places = torch.arange(length)
        ages = places[:, None] - places
        seen = ages >= 0
        for item in prepared.items:
            for start, end in item.spans if item.modality in self.decoder.bidirectional else ():
                seen[start:end, start:end] = True
        sliding = seen & (ages < self.decoder.config.sliding_window)
        return {"full_attention": seen[None, None], "sliding_attention": sliding[None, None]}

    def tokens(self, chat: Chat, new_tokens: int = NEW_TOKENS) -> list[int]:
        """Greedy decoding of the parts, the whole sequence anew for each token."""
        prepared = self.prepare(chat)
        answer: list[int] = []
        while len(answer) < new_tokens:
            answer.append(int(self.logits(prepared, answer)[-1].argmax()))
            if answer[-1] in self.decoder.eos_token_ids:
                break
        return answer


class Answer:
    """A Responder that waits for the end."""

    def __init__(self) -> None:
        self.responses: list[Any] = []
        self.error: TriptychError | None = None
        self._end = threading.Event()

    def send(self, answer: Any, *, final: bool) -> None:
        self.responses.append(answer)
        if final:
            self._end.set()

    def fail(self, error: TriptychError) -> None:
        self.error = error
        self._end.set()

    def result(self, timeout: float = 60.0) -> list[Any]:
        assert self._end.wait(timeout), "no answer"
        if self.error is not None:
            raise self.error
        return self.responses


TEXT = ("text", "text_turns")
IMAGE = ("turns", "image", "two_images", "wide_image")
VIDEO = ("video", "slow_video", "very_slow_video")
AUDIO = ("audio", "two_audios")
# a server takes ten seconds and more to start
QUICK_SERVED = ("gemma3", "qwen2_5_omni")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that asks for ``parts`` runs for each family, and for each ``case``, ``modality`` (with text) or
    ``medium_kind`` (without) that fits it where it asks for one.
    """
    fixtures = metafunc._arg2fixturedefs.get("parts", ())
    if not fixtures or fixtures[-1].func.__module__ != __name__:
        return
    known = metafunc.config.tiny_builder().FAMILIES  # type: ignore[attr-defined]
    wanted = metafunc.config.getoption("--families")
    if wanted and wanted != "all":
        names = wanted.split(",")
    elif not wanted and "served" in metafunc.fixturenames:
        names = list(QUICK_SERVED)
    else:
        names = [name for name, tiny in known.items() if tiny.quick or wanted]
        if (builtin_checkpoint() / "config.json").is_file():
            names.append("builtin")
    modalities = {name: known[name].modalities if name in known else ("image", "video", "audio") for name in names}
    for fixture, text in (("modality", ("text",)), ("medium_kind", ())):
        if fixture in metafunc.fixturenames:
            pairs = [(name, kind) for name in names for kind in (*text, *modalities[name])]
            metafunc.parametrize(("parts", fixture), pairs, indirect=["parts"], scope="session")
            return
    if "case" not in metafunc.fixturenames:
        # what needs no case needs a medium, but for the server
        fit = [name for name in names if modalities[name] or "served" in metafunc.fixturenames]
        metafunc.parametrize("parts", fit, indirect=True, scope="session")
        return
    cases = []
    for name in names:
        own = {
            *TEXT,
            *(IMAGE if "image" in modalities[name] else ()),
            *(VIDEO if "video" in modalities[name] else ()),
            *(AUDIO if "audio" in modalities[name] else ()),
            *(("mixed",) if len(modalities[name]) == 3 else ()),
            *(("image_and_audio",) if {"image", "audio"} <= set(modalities[name]) else ()),
            *(("image_and_video",) if {"image", "video"} <= set(modalities[name]) else ()),
        }
        without = known[name].without if name in known else {}
        cases += [(name, case) for case in sorted(own - set(without))]
    metafunc.parametrize(("parts", "case"), cases, indirect=["parts"], scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of one family in a row, file by file, and in one process: its models and servers start once."""
    places = [k for k, item in enumerate(items) if "parts" in getattr(getattr(item, "callspec", None), "params", {})]
    families = list(dict.fromkeys(items[k].callspec.params["parts"] for k in places))  # type: ignore[attr-defined]

    def key(item: pytest.Item) -> tuple[int, str]:
        return families.index(item.callspec.params["parts"]), str(item.path)  # type: ignore[attr-defined]

    for place, item in zip(places, sorted([items[k] for k in places], key=key), strict=True):
        items[place] = item
        item.add_marker(pytest.mark.xdist_group(item.callspec.params["parts"]))  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def make_parts(tiny_checkpoint: Callable[[str], Path], pytestconfig: pytest.Config) -> Callable[[str], Parts]:
    """Name of a checkpoint -> its :class:`Parts`."""
    known = pytestconfig.tiny_builder().FAMILIES  # type: ignore[attr-defined]

    def make(name: str) -> Parts:
        return Parts(builtin_checkpoint()) if name == "builtin" else Parts(tiny_checkpoint(name), known[name])

    return make


@pytest.fixture(scope="session")
def parts(request: pytest.FixtureRequest, make_parts: Callable[[str], Parts]) -> Parts:
    return make_parts(request.param)


@pytest.fixture(scope="session")
def new_answer() -> type[Answer]:
    return Answer
