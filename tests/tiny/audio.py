"""Qwen2-Audio; Voxtral as it is published, with Mistral's tokenizer file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .common import Tiny, bpe, draw_weights
from .qwen import make_tokenizer, text_shape

_QWEN2_TEMPLATE = (
    "{% set count = namespace(value=0) %}"
    "{%- for m in messages -%}"
    "{%- if loop.first and m['role'] != 'system' -%}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{%- endif -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'audio' -%}{%- set count.value = count.value + 1 -%}"
    "{{ 'Audio ' + count.value|string + ': <|audio_start|><|audio_pad|><|audio_end|>\n' }}"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def _qwen2_audio() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    text = text_shape(tokenizer) | {
        "model_type": "qwen2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = transformers.Qwen2AudioConfig(
        text_config=text,
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 100,
        },
        audio_token_index=tokenizer.audio_token_id,
    )
    processor = transformers.Qwen2AudioProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2),
        tokenizer=tokenizer,
        chat_template=_QWEN2_TEMPLATE,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config), processor


# ids of Mistral's tokens; the audio token is 24 in all checkpoints
_TEKKEN = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{i}>" for i in range(5, 11)), "<pad>"]
_TEKKEN += [*(f"<SPECIAL_{i}>" for i in range(12, 17)), "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
_TEKKEN += [*(f"<SPECIAL_{i}>" for i in range(19, 24)), "[AUDIO]", "[BEGIN_AUDIO]"]
_AUDIO_TOKEN = 24


def _tekken() -> dict[str, Any]:
    """A small tokenizer in Mistral's format: bytes, then what they are merged to, in this order."""
    merges = json.loads(bpe([]).to_str())["model"]["merges"]
    as_byte = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(as_byte[letter] for letter in "".join(pair)) for pair in merges]
    special = 32
    return {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + special,
            "default_num_special_tokens": special,
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(_TEKKEN)],
    }


def _voxtral(folder: Path) -> None:
    config = transformers.VoxtralConfig(
        audio_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_mel_bins": 16,
            "max_source_positions": 100,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 11,
        },
        audio_token_id=_AUDIO_TOKEN,
    )
    model = transformers.VoxtralForConditionalGeneration(config)
    draw_weights(model)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=11)
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(folder)
    (folder / "tekken.json").write_text(json.dumps(_tekken()))


class _VoxtralPrompts:
    """Prompts as Mistral's package writes them, written anew: token by token, without a template."""

    def __init__(self, folder: Path) -> None:
        tekken = json.loads((folder / "tekken.json").read_text())
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        self.bos_token = None
        self._pattern = tekken["config"]["pattern"]
        self._ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tekken["vocab"]}
        self._special = tekken["config"]["default_num_special_tokens"]

    def apply_chat_template(self, conversation: list[Any], **_: Any) -> list[Any]:
        """Token ids, and None for each sound."""
        tokens: list[Any] = [1]
        for message in conversation:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            body: list[Any] = []
            for part in parts:
                body += [25, None] if part["type"] == "audio" else self.encode(part["text"])
            tokens += [3, *body, 4] if message["role"] == "user" else [*body, 2]
        return tokens

    def encode(self, text: str) -> list[int]:
        """Merge the pair of lowest rank, again and again."""
        import regex

        found = []
        for word in regex.findall(self._pattern, text):
            parts = [bytes([byte]) for byte in word.encode()]
            while True:
                pairs = [self._ranks.get(a + b, len(self._ranks)) for a, b in pairwise(parts)]
                if not pairs or min(pairs) == len(self._ranks):
                    break
                at = pairs.index(min(pairs))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            found += [self._ranks[part] + self._special for part in parts]
        return found


def _voxtral_reference(folder: Path) -> tuple[Any, Any]:
    model = transformers.VoxtralForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), _VoxtralPrompts(folder)


def _voxtral_inputs(prompts: Any, tokens: list[Any], media: Mapping[str, list[Any]]) -> Mapping[str, Any]:
    pieces = []
    ids = list(tokens)
    for sound in media.get("audio", ()):
        made = transformers.VoxtralProcessor._retrieve_input_features(
            _Holder(prompts.extractor),
            [sound.samples],
            max_source_positions=200,
            sampling_rate=16000,
            padding=True,
            truncation=False,
            pad_to_multiple_of=32000,
            return_tensors="pt",
        )
        pieces.append(made)
        at = ids.index(None)
        ids[at : at + 1] = [_AUDIO_TOKEN] * (25 * len(made))
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    return inputs | ({"input_features": torch.cat(pieces)} if pieces else {})


class _Holder:
    def __init__(self, feature_extractor: Any) -> None:
        self.feature_extractor = feature_extractor


FAMILIES = {
    "qwen2_audio": Tiny(_qwen2_audio, ("audio",)),
    "voxtral": Tiny(_voxtral, ("audio",), system=False, reference=_voxtral_reference, inputs=_voxtral_inputs),
}
