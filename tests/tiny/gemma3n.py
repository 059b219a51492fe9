"""Gemma 3n: with pictures where timm, whose the vision tower is, is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, processors
from torch import nn

from .common import Tiny, bpe, draw_weights

_NAMED = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
    "audio_token": "<audio_soft_token>",
}
# As published: text, then ids of the vision projector's table, then of the audio projector's.
_TEXT, _TABLE = 512, 8
_PLACES = {"eoi_token": 0, "image_token": 1, "eoa_token": _TABLE, "audio_token": _TABLE + 1}
_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}"
    "{%- if system is not string -%}{%- set system = system[0]['text'] -%}{%- endif -%}"
    "{%- set prefix, turns = system + '\n\n', messages[1:] -%}"
    "{%- else -%}{%- set prefix, turns = '', messages -%}{%- endif -%}"
    "{%- for m in turns -%}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ prefix if loop.first else '' }}"
    "{%- if m['content'] is string -%}{{ m['content'] | trim }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<image_soft_token>{%- elif c['type'] == 'audio' -%}<audio_soft_token>"
    "{%- else -%}{{ c['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
_SEES = find_spec("timm") is not None


def _tokenizer() -> Any:
    begins = [_NAMED["boi_token"], _NAMED["boa_token"]]
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *begins]
    raw = bpe(special)
    behind = {_TEXT + place: _NAMED[name] for name, place in _PLACES.items()}
    names = [behind.get(i, f"<unused_{i}>") for i in range(raw.get_vocab_size(), _TEXT + 2 * _TABLE)]
    raw.add_special_tokens([AddedToken(name, special=True) for name in names])
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", raw.token_to_id("<bos>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_specific_special_tokens=_NAMED,
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>", *_NAMED.values()],
        padding_side="left",
    )


class _NoTowerConfig(transformers.Gemma3nVisionConfig):
    model_type = "gemma3n_tiny_vision"


class _NoTower(transformers.PreTrainedModel):
    """In the place of a tower that needs timm."""

    config_class = _NoTowerConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.unused = nn.Linear(2, 2)
        self.post_init()


transformers.AutoModel.register(_NoTowerConfig, _NoTower)


def _config(tokenizer: Any) -> Any:
    text = {
        "vocab_size": _TEXT + 2 * _TABLE,
        "vocab_size_per_layer_input": _TEXT,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 16,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        # the last two read what the third and the fourth keep
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "sliding_window": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5] + [0.0] * 5,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    audio = {
        "vocab_size": _TABLE,
        "vocab_offset": _TEXT + _TABLE,
        "input_feat_size": 32,
        "hidden_size": 32,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 2,
        "sscp_conv_channel_size": (8, 4),
        "conf_attention_chunk_size": 4,
        "conf_attention_context_left": 5,
    }
    vision = {"architecture": "resnet10t", "hidden_size": 512, "vocab_size": _TABLE, "vocab_offset": _TEXT}
    return transformers.Gemma3nConfig(
        text_config=text,
        audio_config=audio,
        vision_config=vision,
        audio_soft_tokens_per_image=24,
        vision_soft_tokens_per_image=4,
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in _NAMED.items()},
    )


def _blind(config: Any) -> Any:
    """The same without the tower."""
    options = config.vision_config.to_dict()
    options.pop("model_type")
    config.vision_config = _NoTowerConfig(**options)
    return config


def _make(folder: Path) -> None:
    tokenizer = _tokenizer()
    config = _config(tokenizer)
    model = transformers.Gemma3nForConditionalGeneration(config if _SEES else _blind(config))
    draw_weights(model)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    # with the tower that a real checkpoint names
    config = _config(tokenizer)
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(folder)
    transformers.Gemma3nProcessor(
        feature_extractor=transformers.Gemma3nAudioFeatureExtractor(feature_size=32),
        image_processor=transformers.SiglipImageProcessor(size={"height": 64, "width": 64}, do_normalize=False),
        tokenizer=tokenizer,
        chat_template=_TEMPLATE,
        image_seq_length=4,
        audio_seq_length=24,
    ).save_pretrained(folder)


def _reference(folder: Path) -> tuple[Any, Any]:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.Gemma3nForConditionalGeneration.from_pretrained(
        folder, config=config if _SEES else _blind(config), dtype=torch.float32
    )
    return model.eval(), processor


FAMILIES = {"gemma3n": Tiny(_make, ("image", "audio") if _SEES else ("audio",), reference=_reference)}
