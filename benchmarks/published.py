"""Configurations of published checkpoints, as changes to those of the tests' tiny ones.

What a tiny checkpoint (tests/tiny) and the published one share, such as names of classes, the special tokens of its
made-up tokenizer and the chat template, comes from there; here is what makes it large. Values are those of config.json
and of the processor's files on the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A published checkpoint without its weights.

    Attributes:
        model: its name on the hub.
        tiny: (module of tests/tiny, family there) to start from.
        config: changes to config.json; None removes what is there.
        processor: the same for the processor's file, of whichever name.
        parameters: of the published checkpoint, in billions.
        rows: that the encoder gives for a picture of 1024 x 1024 pixels, for a sound of ten seconds where it takes
            sounds.
        modality: what it is asked about: "image" or "audio".
    """

    model: str
    tiny: tuple[str, str]
    config: Mapping[str, Any]
    parameters: float
    rows: int
    processor: Mapping[str, Any] = field(default_factory=dict)
    modality: str = "image"


_HALF: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def _text(layers: int, hidden: int, inner: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "layer_types": None,
    }


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_QWEN3_ROPE = {"rope_theta": 5e6, "mrope_section": [24, 20, 20]}
_QWEN3_PROCESSOR = {
    "image_processor": {"patch_size": 16, "size": {"shortest_edge": 256**2, "longest_edge": 4096**2}, **_HALF},
    "video_processor": {
        "patch_size": 16,
        "size": {"shortest_edge": 4096, "longest_edge": 25165824},
        "max_frames": 768,
    },
}


def _qwen3_vision(out: int) -> dict[str, Any]:
    return {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
        "out_hidden_size": out,
    }


# DeepSeek-V2-Lite and Moonlight have the same attention and experts of the same size.
_MLA_EXPERTS = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
_TILES = [[384 * columns, 384 * rows] for columns in range(1, 10) for rows in range(1, 10) if columns * rows <= 9]

SHAPES = {
    "deepseek-vl2-small": Shape(
        model="deepseek-ai/deepseek-vl2-small",
        tiny=("deepseek_vl2", "deepseek_vl2_small"),
        config={
            "candidate_resolutions": _TILES,
            "language_config": {
                **_MLA_EXPERTS,
                "intermediate_size": 10944,
                "vocab_size": 102400,
                "max_position_embeddings": 4096,
            },
            "projector_config": {"n_embed": 2048, "input_dim": 1152},
            "vision_config": {
                "image_size": 384,
                "layers": 27,
                "heads": 16,
                "mlp_ratio": 3.7362,
                "patch_size": 14,
                "width": 1152,
            },
        },
        processor={"candidate_resolutions": _TILES, "patch_size": 14},
        parameters=16.15,
        # 14 x 14 and a line's end for the whole, 3 x 3 tiles of them, and one between
        rows=14 * 15 + 1 + 42 * 43,
    ),
    "gemma3-12b": Shape(
        model="google/gemma-3-12b-it",
        tiny=("gemma", "gemma3"),
        config={
            "mm_tokens_per_image": 256,
            "text_config": {
                **_text(48, 3840, 15360, 16, 8, 262208),
                "head_dim": 256,
                "query_pre_attn_scalar": 256,
                "max_position_embeddings": 131072,
                "sliding_window": 1024,
            },
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
            },
        },
        processor={"image_processor": {"size": _square(896)}, "image_seq_length": 256},
        parameters=12.19,
        rows=256,
    ),
    "glm-4.1v-9b": Shape(
        model="zai-org/GLM-4.1V-9B-Thinking",
        tiny=("glm", "glm4v"),
        config={
            "text_config": {
                **_text(40, 4096, 13696, 32, 2, 151552),
                "head_dim": 128,
                "max_position_embeddings": 65536,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"mrope_section": [8, 12, 12]},
            },
            "vision_config": {
                "depth": 24,
                "hidden_size": 1536,
                "intermediate_size": 13696,
                "out_hidden_size": 4096,
                "num_heads": 12,
                "patch_size": 14,
                "image_size": 336,
            },
        },
        processor={
            "image_processor": {"patch_size": 14, "size": {"shortest_edge": 112**2, "longest_edge": 9633792}},
            "video_processor": {"patch_size": 14, "size": {"shortest_edge": 112**2, "longest_edge": 47040000}},
        },
        parameters=10.29,
        rows=37**2,
    ),
    "internvl3-8b": Shape(
        model="OpenGVLab/InternVL3-8B-hf",
        tiny=("internvl", "internvl"),
        config={
            "image_seq_length": 256,
            "text_config": {
                **_text(28, 3584, 18944, 28, 4, 151674),
                "head_dim": None,
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_theta": 1e6},
            },
            "vision_config": {
                "attention_bias": True,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": [448, 448],
                "patch_size": [14, 14],
            },
        },
        processor={
            "image_processor": {"max_patches": 12, "size": _square(448), **_IMAGENET},
            "video_processor": {"size": _square(448), **_IMAGENET},
            "image_seq_length": 256,
        },
        parameters=7.94,
        # 3 x 3 tiles and the whole
        rows=10 * 256,
    ),
    "kimi-vl-a3b": Shape(
        model="moonshotai/Kimi-VL-A3B-Instruct",
        tiny=("kimi", "kimi_vl"),
        config={
            "vocab_size": 163840,
            "text_config": {
                **_MLA_EXPERTS,
                "intermediate_size": 11264,
                "vocab_size": 163840,
                "max_position_embeddings": 131072,
            },
            "vision_config": {
                "patch_size": 14,
                "init_pos_emb_height": 64,
                "init_pos_emb_width": 64,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
            },
        },
        processor={"in_token_limit": 4096, "patch_size": 14},
        parameters=16.41,
        # made smaller to 897 pixels, then filled up to 924
        rows=33**2,
    ),
    "llama-3.2-11b-vision": Shape(
        model="meta-llama/Llama-3.2-11B-Vision-Instruct",
        tiny=("mllama", "mllama"),
        config={
            "text_config": {
                **_text(40, 4096, 14336, 32, 8, 128256),
                "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_theta": 5e5, "original_max_position_embeddings": 8192},
            },
            "vision_config": {
                "hidden_size": 1280,
                "num_hidden_layers": 32,
                "num_global_layers": 8,
                "attention_heads": 16,
                "intermediate_size": 5120,
                "image_size": 560,
                "patch_size": 14,
                "intermediate_layers_indices": [3, 7, 15, 23, 30],
                "vision_output_dim": 7680,
            },
        },
        processor={
            "image_processor": {
                "size": _square(560),
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            }
        },
        parameters=10.67,
        # four tiles of 40 x 40 patches and a class
        rows=4 * 1601,
    ),
    "llava-1.5-7b": Shape(
        model="llava-hf/llava-1.5-7b-hf",
        tiny=("llava", "llava"),
        config={
            "image_seq_length": 576,
            "text_config": {
                **_text(32, 4096, 11008, 32, 32, 32064),
                "head_dim": 128,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
            },
            "vision_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
        processor={
            "image_processor": {"crop_size": _square(336), "size": {"shortest_edge": 336}},
            "patch_size": 14,
        },
        parameters=7.06,
        rows=576,
    ),
    "mistral-small-3.1-24b": Shape(
        model="mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        tiny=("llava", "mistral3"),
        config={
            "text_config": {
                **_text(40, 5120, 32768, 32, 8, 131072),
                "head_dim": 128,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_theta": 1e9},
            },
            "vision_config": {
                "hidden_act": "silu",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "head_dim": 64,
                "image_size": 1540,
                "patch_size": 14,
            },
        },
        processor={
            "image_processor": {"patch_size": 14, "size": {"longest_edge": 1540}},
            "patch_size": 14,
        },
        parameters=24.01,
        rows=37**2,
    ),
    "nemotron-nano-12b-v2-vl": Shape(
        model="nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16",
        tiny=("nemotron", "nemotron_nano_vl"),
        config={
            "force_image_size": 512,
            "projector_hidden_size": 20480,
            "vit_hidden_size": 1280,
            "llm_config": {
                "hidden_size": 5120,
                "hybrid_override_pattern": "M-M-M-M*-" * 6 + "M-M-M-M-",
                "intermediate_size": 20480,
                "max_position_embeddings": 131072,
                "num_attention_heads": 40,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "ssm_state_size": 128,
                "mamba_num_heads": 128,
                "mamba_head_dim": 80,
                "n_groups": 8,
                "chunk_size": 128,
                "vocab_size": 131072,
                # no layer has experts
                "n_routed_experts": None,
                "n_shared_experts": None,
                "moe_intermediate_size": None,
                "moe_shared_expert_intermediate_size": None,
                "num_experts_per_tok": None,
            },
            "vision_config": {
                "hidden_size": None,
                "num_hidden_layers": None,
                "num_attention_heads": None,
                "mlp_ratio": None,
                "args": {"model": "vit_huge_patch16_224", "register_multiple": 8, "cpe_max_size": 2048},
                "max_resolution": 2048,
            },
        },
        parameters=13.2,
        # 2 x 2 tiles and the whole
        rows=5 * 256,
    ),
    "qwen2-audio-7b": Shape(
        model="Qwen/Qwen2-Audio-7B-Instruct",
        tiny=("audio", "qwen2_audio"),
        config={
            "text_config": {
                **_text(32, 4096, 11008, 32, 32, 156032),
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
            },
            "audio_config": {
                "d_model": 1280,
                "encoder_layers": 32,
                "encoder_attention_heads": 20,
                "encoder_ffn_dim": 5120,
                "num_mel_bins": 128,
                "max_source_positions": 1500,
            },
        },
        processor={
            "feature_extractor": {
                "feature_size": 128,
                "chunk_length": 30,
                "n_samples": 480000,
                "nb_max_frames": 3000,
            }
        },
        parameters=8.40,
        rows=250,
        modality="audio",
    ),
    "qwen2.5-vl-7b": Shape(
        model="Qwen/Qwen2.5-VL-7B-Instruct",
        tiny=("qwen", "qwen2_5_vl"),
        config={
            "text_config": {
                **_text(28, 3584, 18944, 28, 4, 152064),
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "out_hidden_size": 3584,
            },
        },
        processor={
            "image_processor": {"patch_size": 14, "size": {"shortest_edge": 56**2, "longest_edge": 28**2 * 16384}},
            "video_processor": {
                "patch_size": 14,
                "size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2},
                "max_frames": 768,
            },
        },
        parameters=8.29,
        rows=37**2,
    ),
    "qwen3-vl-30b-a3b": Shape(
        model="Qwen/Qwen3-VL-30B-A3B-Instruct",
        tiny=("qwen3", "qwen3_vl_moe"),
        config={
            "text_config": {
                **_text(48, 2048, 6144, 32, 4, 151936),
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_local_experts": None,
                "num_experts_per_tok": 8,
                "rope_parameters": _QWEN3_ROPE,
            },
            "vision_config": _qwen3_vision(2048),
        },
        processor=_QWEN3_PROCESSOR,
        parameters=31.07,
        rows=32**2,
    ),
    "qwen3-vl-8b": Shape(
        model="Qwen/Qwen3-VL-8B-Instruct",
        tiny=("qwen3", "qwen3_vl"),
        config={
            "text_config": {
                **_text(36, 4096, 12288, 32, 8, 151936),
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "rope_parameters": _QWEN3_ROPE,
            },
            "vision_config": _qwen3_vision(4096),
        },
        processor=_QWEN3_PROCESSOR,
        parameters=8.77,
        rows=32**2,
    ),
}
