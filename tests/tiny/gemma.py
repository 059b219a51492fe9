"""Gemma 3."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import processors

from .common import Tiny, bpe

# Gemma's own begins every prompt and calls the assistant "model".
_GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}"
    "{%- if system is not string -%}{%- set system = system[0]['text'] -%}{%- endif -%}"
    "{%- set prefix, turns = system + '\n\n', messages[1:] -%}"
    "{%- else -%}{%- set prefix, turns = '', messages -%}{%- endif -%}"
    "{%- for m in turns -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ prefix if loop.first else '' }}"
    "{%- if m['content'] is string -%}{{ m['content'] | trim }}{%- else -%}{%- for c in m['content'] -%}"
    "{{ '<start_of_image>' if c['type'] == 'image' else c['text'] | trim }}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def _gemma_tokenizer() -> Any:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values()]
    raw = bpe(special)
    # every text begins with <bos>, as Gemma's tokenizer has it
    bos = raw.token_to_id("<bos>")
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_specific_special_tokens=named,
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>", *named.values()],
        padding_side="left",
    )


def _gemma_text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 4,
        "max_position_embeddings": 2048,
        # longer than a picture, shorter than a prompt with one
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _gemma3_text() -> tuple[Any, Any]:
    tokenizer = _gemma_tokenizer()
    tokenizer.chat_template = _GEMMA_TEMPLATE
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_gemma_text(tokenizer))), tokenizer


def _gemma3() -> tuple[Any, Any]:
    tokenizer = _gemma_tokenizer()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "vision_use_head": False,
    }
    config = transformers.Gemma3Config(
        text_config=_gemma_text(tokenizer),
        vision_config=vision,
        mm_tokens_per_image=16,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        chat_template=_GEMMA_TEMPLATE,
        image_seq_length=16,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


FAMILIES = {"gemma3": Tiny(_gemma3, ("image",), quick=True), "gemma3_text": Tiny(_gemma3_text, quick=True)}
