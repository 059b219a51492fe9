"""Janus, in transformers' format and in the published one; DeepSeek-VL."""

from __future__ import annotations

from typing import Any

import transformers

from .common import Tiny, bpe

_NAMED = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
_SIDE = {"height": 32, "width": 32}
# DeepSeek's own has no marks around a system message.
_TEMPLATE = (
    "{%- for m in messages -%}"
    "{{ {'user': '<|User|>: ', 'assistant': '<|Assistant|>: ', 'system': ''}[m['role']] }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{{ '<image_placeholder>\n' if c['type'] == 'image' else c['text'] }}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<｜end▁of▁sentence｜>' if m['role'] == 'assistant' else '\n\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|Assistant|>:{%- endif -%}"
)


def _tokenizer(named: dict[str, str]) -> Any:
    special = [BOS, EOS, PAD, "<|User|>", "<|Assistant|>", *named.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_specific_special_tokens=named,
        extra_special_tokens=special[3:],
        padding_side="left",
    )


def llama(tokenizer: Any) -> dict[str, Any]:
    """A small Llama."""
    return {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _janus() -> tuple[Any, Any]:
    tokenizer = _tokenizer(_NAMED)
    config = transformers.JanusConfig(
        text_config=llama(tokenizer),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "mlp_ratio": 1.5,
            "projection_dim": 64,
            "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.JanusProcessor(
        image_processor=transformers.JanusImageProcessor(size=_SIDE),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=_TEMPLATE,
    )
    return transformers.JanusForConditionalGeneration(config), processor


_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}


def _deepseek_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image_token": "<image_placeholder>"})
    config = transformers.DeepseekVLConfig(
        text_config=llama(tokenizer),
        vision_config=_SIGLIP,
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.DeepseekVLProcessor(
        image_processor=transformers.DeepseekVLImageProcessor(size=_SIDE),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=_TEMPLATE,
    )
    return transformers.DeepseekVLForConditionalGeneration(config), processor


def _deepseek_vl_hybrid() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image_token": "<image_placeholder>"})
    config = transformers.DeepseekVLHybridConfig(
        text_config=llama(tokenizer),
        vision_config=_SIGLIP,
        high_res_vision_config={
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "mlp_dim": 48,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    processor = transformers.DeepseekVLHybridProcessor(
        image_processor=transformers.DeepseekVLHybridImageProcessor(
            size=_SIDE, high_res_size={"height": 64, "width": 64}, high_res_image_mean=[0.5, 0.4, 0.3]
        ),
        tokenizer=tokenizer,
        num_image_tokens=16,
        chat_template=_TEMPLATE,
    )
    return transformers.DeepseekVLHybridForConditionalGeneration(config), processor


FAMILIES = {
    "deepseek_vl": Tiny(_deepseek_vl, ("image",)),
    "deepseek_vl_hybrid": Tiny(_deepseek_vl_hybrid, ("image",)),
    "janus": Tiny(_janus, ("image",)),
}
