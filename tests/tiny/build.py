"""Tiny checkpoints with random weights, made offline with the real config, processor and tokenizer classes.

    python tests/tiny/build.py FAMILY FOLDER

Weights are drawn wide enough that logits are far from flat: two different computations would give different tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from triptych.python_models.families import torchvision_fix

torchvision_fix.install()

import transformers  # noqa: E402

_CORPUS = [
    "the quick brown fox jumps over the lazy dog. describe this image, video and audio in detail please! "
    "what is shown here? user assistant system hello world numbers 0123456789 "
    "How many objects are there and which colours do they have? Transcribe the audio."
] * 4 + [chr(c) * 2 for c in range(32, 127)]
_NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_token": "<|audio_pad|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] not in ('system', 'user', 'assistant') -%}"
    "{{ raise_exception('unknown role ' + m['role']) }}{%- endif -%}"
    "{%- if m['role'] == 'system' and not loop.first -%}"
    "{{ raise_exception('the system message must come first') }}{%- endif -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif c['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif c['type'] == 'audio' -%}<|audio_start|><|audio_pad|><|audio_end|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
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
_IMAGE_SIZE = {"shortest_edge": 32 * 32, "longest_edge": 112 * 112}
_VIDEO_SIZE = {"shortest_edge": 2 * 32 * 32, "longest_edge": 8 * 64 * 64}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_heads": 2,
    "patch_size": 8,
    "window_size": 32,
    "fullatt_block_indexes": [1],
}


def _bpe(special: list[str]) -> Any:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    return raw


def _tokenizer() -> Any:
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", *_NAMED.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_specific_special_tokens=_NAMED,
        extra_special_tokens=[s for s in special if s not in ("<|im_end|>", "<|pad|>")],
        padding_side="left",
    )


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vision_ids(tokenizer: Any) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.vision_bos_token_id,
        "vision_end_token_id": tokenizer.vision_eos_token_id,
    }


def _vision_processors() -> dict[str, Any]:
    return {
        "image_processor": transformers.Qwen2VLImageProcessor(patch_size=8, size=_IMAGE_SIZE),
        "video_processor": transformers.Qwen2VLVideoProcessor(
            patch_size=8, size=_VIDEO_SIZE, cap_pixels_per_frame=False, fps=2.0, max_frames=8
        ),
    }


def _qwen2_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    config = transformers.Qwen2VLConfig(
        text_config=_text(tokenizer),
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8},
        **_vision_ids(tokenizer),
    )
    processor = transformers.Qwen2VLProcessor(tokenizer=tokenizer, chat_template=_TEMPLATE, **_vision_processors())
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(tokenizer), vision_config=_VISION, **_vision_ids(tokenizer)
    )
    processor = transformers.Qwen2_5_VLProcessor(tokenizer=tokenizer, chat_template=_TEMPLATE, **_vision_processors())
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen2_5_omni() -> tuple[Any, Any]:
    tokenizer = _tokenizer()
    ids = _vision_ids(tokenizer)
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=_text(tokenizer),
        vision_config=_VISION,
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "d_model": 32,
            "max_source_positions": 100,
            "n_window": 25,
            "output_dim": 64,
        },
        audio_token_index=tokenizer.audio_token_id,
        image_token_index=ids.pop("image_token_id"),
        video_token_index=ids.pop("video_token_id"),
        audio_start_token_id=tokenizer.audio_bos_token_id,
        audio_end_token_id=tokenizer.audio_eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    processor = transformers.Qwen2_5OmniProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=4),
        tokenizer=tokenizer,
        chat_template=_TEMPLATE,
        **_vision_processors(),
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def _gemma_tokenizer() -> Any:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values()]
    raw = _bpe(special)
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


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_5_omni": _qwen2_5_omni,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3_text,
}


def build(family: str, folder: Path) -> None:
    """Write the tiny checkpoint of ``family`` (a key of :data:`FAMILIES`) into ``folder``."""
    model, processor = FAMILIES[family]()
    _draw_weights(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _draw_weights(model: Any) -> None:
    """Standard deviation 1/sqrt(inputs), 1 for token embeddings, and biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    # Gemma multiplies them by sqrt(width), and they are its head: larger ones would make it repeat each token
    embedding = 0.03 if hasattr(model.get_input_embeddings(), "embed_scale") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                scale = embedding if "embed_tokens" in name else parameter[0].numel() ** -0.5
            elif "bias" in name:
                scale = 0.1
            elif not parameter.any():
                # of Gemma's norms, which add 1
                scale = 0.5
            else:
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a tiny checkpoint with random weights.")
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    build(arguments.family, arguments.folder)


if __name__ == "__main__":
    main()
