"""Phi-4-multimodal: in transformers' form with its adapters beside it, and as published with the adapters inside."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from .common import Tiny, bpe, draw_weights

_RANKS = {"vision": 8, "speech": 4}
_ALPHA = {"vision": 16, "speech": 12}
_ADAPTED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# As published: texts alone, media stand in them as their tokens.
_TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
_TEMPLATE = (
    "{%- for m in messages -%}{{ '<|' + m['role'] + '|>' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
    "{%- if c['type'] == 'image' -%}<|endoftext10|>{%- elif c['type'] == 'audio' -%}<|endoftext11|>"
    "{%- else -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
_NAMED = {"image_token": "<|endoftext10|>", "audio_token": "<|endoftext11|>"}
# pictures of 32 patches a side: the processor counts on that
_SIDE, _PATCH = 128, 4


def _tokenizer(template: str) -> Any:
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    special = ["<|endoftext|>", *roles, *_NAMED.values()]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe(special),
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        model_specific_special_tokens=_NAMED,
        extra_special_tokens=[*roles[:3], *_NAMED.values()],
        padding_side="left",
    )
    tokenizer.chat_template = template
    return tokenizer


def _config(tokenizer: Any, rope: dict[str, Any], switch: int = 4096) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": _SIDE,
        "crop_size": _SIDE,
        "patch_size": _PATCH,
        "image_token_id": tokenizer.image_token_id,
    }
    audio = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_blocks": 2,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 16,
        "input_size": 16,
        "bias_max_distance": 64,
        "audio_token_id": tokenizer.audio_token_id,
    }
    return transformers.Phi4MultimodalConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        original_max_position_embeddings=switch,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75, **rope},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.pad_token_id, tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        vision_config=vision,
        audio_config=audio,
    )


def _processor(tokenizer: Any) -> Any:
    return transformers.Phi4MultimodalProcessor(
        image_processor=transformers.Phi4MultimodalImageProcessor(
            size={"height": _SIDE, "width": _SIDE}, patch_size=_PATCH, dynamic_hd=4
        ),
        audio_processor=transformers.Phi4MultimodalFeatureExtractor(feature_size=16),
        tokenizer=tokenizer,
    )


def _model(config: Any) -> Any:
    model = transformers.Phi4MultimodalForCausalLM(config)
    draw_weights(model)
    with torch.no_grad():
        # also the head's: transformers fails on an answer that holds a medium's token
        model.get_input_embeddings().weight[
            [config.vision_config.image_token_id, config.audio_config.audio_token_id]
        ] = 0
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def _adapters(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Adapter -> weights, by their names in peft."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in _RANKS}
    for path, module in model.named_modules():
        if path.startswith("model.layers.") and path.rpartition(".")[2] in _ADAPTED:
            for name, rank in _RANKS.items():
                own = found[name]
                for half, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                    own[f"{path}.lora_{half}.weight"] = torch.randn(shape, generator=generator) * 0.2
    return found


def _write_whole(folder: Path, model: Any, adapters: dict[str, dict[str, torch.Tensor]], prefix: str) -> None:
    """transformers' form."""
    tokenizer = _tokenizer(_TEMPLATE)
    model.save_pretrained(folder)
    _processor(tokenizer).save_pretrained(folder)
    for name, weights in adapters.items():
        own = folder / f"{name}-lora"
        own.mkdir()
        save_file({prefix + key: value for key, value in weights.items()}, own / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": _RANKS[name], "lora_alpha": _ALPHA[name], "bias": "none"}
        (own / "adapter_config.json").write_text(json.dumps(config))


def _native(folder: Path) -> None:
    model = _model(_config(_tokenizer(_TEMPLATE), {"rope_type": "default"}))
    _write_whole(folder, model, _adapters(model), "base_model.model.")


# transformers' names -> published ones
_PUBLISHED = (
    (r"\.feed_forward_(in|out)\.gate_up_proj\.", r".feed_forward_\1.net.0.linear."),
    (r"\.feed_forward_(in|out)\.down_proj\.", r".feed_forward_\1.net.2."),
    (r"(\.encoders\.\d+\.self_attn)\.(q|k|v)_proj\.", r"\1.linear_\2."),
    (r"(\.encoders\.\d+\.self_attn)\.o_proj\.", r"\1.linear_out."),
    (r"\.img_projection_up\.", ".img_projection.0."),
    (r"\.img_projection_down\.", ".img_projection.2."),
    (r"\.global_img_feature_extensor$", ".glb_GN"),
    (r"\.sub_img_feature_extensor$", ".sub_GN"),
    (r"\.up_proj_for_speech\.", ".audio_projection.speech.0."),
    (r"\.down_proj_for_speech\.", ".audio_projection.speech.2."),
    (r"\.up_proj_for_vision_speech\.", ".audio_projection.vision.0."),
    (r"\.down_proj_for_vision_speech\.", ".audio_projection.vision.2."),
    (r"^(model\.layers\.\d+\.\w+\.(?:qkv_proj|o_proj|gate_up_proj|down_proj))\.weight$", r"\1.base_layer.weight"),
)


def _published(folder: Path) -> None:
    tokenizer = _tokenizer(_TEXT_TEMPLATE)
    factors = {"short_factor": [1.0 + 0.1 * k for k in range(6)], "long_factor": [2.0 + k for k in range(6)]}
    # between a prompt with one picture and one with two
    config = _config(tokenizer, {"rope_type": "longrope", **factors}, switch=600)
    model = _model(config)
    adapters = _adapters(model)
    (folder / "whole").mkdir(parents=True)
    _write_whole(folder / "whole", model, adapters, "")

    weights = {}
    for key, value in model.state_dict().items():
        if key != "lm_head.weight":
            for pattern, name in _PUBLISHED:
                key = re.sub(pattern, name, key)
            weights[key] = value.contiguous()
    for name, own in adapters.items():
        weights |= {re.sub(r"\.(lora_[AB])\.", rf".\1.{name}.", key): value for key, value in own.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    audio = config.audio_config.to_dict()
    kept = ("num_blocks", "input_size", "time_reduction", "left_chunk", "chunk_size", "kernel_size")
    kept += ("ext_pw_out_channel", "depthwise_separable_out_channel", "depthwise_multiplier")
    kept += ("conv_activation", "conv_glu_type", "activation")
    text = config.to_dict()
    published = {
        "model_type": "phi4mm",
        "architectures": ["Phi4MMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi4mm.Phi4MMConfig"},
        **{key: text[key] for key in text if key.startswith("num_") or key.endswith("_size")},
        **{key: text[key] for key in ("hidden_act", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")},
        **{key: text[key] for key in ("original_max_position_embeddings", "bos_token_id", "pad_token_id")},
        "eos_token_id": text["pad_token_id"],
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "sliding_window": 262144,
        "use_cache": True,
        "resid_pdrop": 0.0,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", **factors},
        "torch_dtype": "float32",
        "embd_layer": {
            "audio_embd_layer": {"downsample_rate": 1, "embedding_cls": "audio", "use_conv_downsample": False},
            "embedding_cls": "image_audio",
            "image_embd_layer": {"crop_size": _SIDE, "embedding_cls": "tune_image", "use_hd_transform": True},
        },
        "img_processor": None,
        # the published code has these in itself
        "vision_config": {k: v for k, v in config.vision_config.to_dict().items() if k != "image_token_id"},
        "audio_processor": {
            "name": "cascades",
            "config": {
                **{key: audio[key] for key in kept},
                "attention_dim": audio["hidden_size"],
                "attention_heads": audio["num_attention_heads"],
                "linear_units": audio["intermediate_size"],
                "causal": True,
                "batch_norm": False,
                "bias_in_glu": True,
                "cnn_layer_norm": True,
                "ext_pw_kernel_size": 1,
                "input_layer": "nemo_conv",
                "nemo_conv_settings": {"conv_channels": audio["nemo_conv_channels"]},
                "relative_attention_bias_args": {"t5_bias_max_distance": audio["bias_max_distance"], "type": "t5"},
            },
        },
        **{f"{name}_lora": {"r": _RANKS[name], "lora_alpha": _ALPHA[name], "dp": 0.0} for name in _RANKS},
    }
    (folder / "config.json").write_text(json.dumps(published))
    tokenizer = _tokenizer(_TEXT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    # the published tokenizer has no names for these tokens
    for key in ("model_specific_special_tokens", *_NAMED):
        saved.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    options = {
        "processor_class": "Phi4MMProcessor",
        "image_processor_type": "Phi4MMImageProcessor",
        "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
        "auto_map": {"AutoProcessor": "processing_phi4mm.Phi4MMProcessor"},
        "dynamic_hd": 4,
        "audio_compression_rate": 8,
        "audio_downsample_rate": 1,
        "audio_feat_stride": 1,
        # of the tiny one alone
        "size": {"height": _SIDE, "width": _SIDE},
        "patch_size": _PATCH,
        "feature_size": 16,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(options))


class Merged:
    """transformers' model, its weights merged with the adapter that a request takes."""

    def __init__(self, folder: Path) -> None:
        base = transformers.Phi4MultimodalForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for module in base.model.embed_tokens_extend.image_embed.img_processor.modules():
            # a slip of transformers 5.23: without padding its layers would be causal, with padding they are not
            module.is_causal = False
        self._models = {"": base}
        for name in _RANKS:
            weights = load_file(folder / f"{name}-lora" / "adapter_model.safetensors")
            weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
            merged = copy.deepcopy(base)
            with torch.no_grad():
                for path, module in merged.named_modules():
                    if f"{path}.lora_A.weight" in weights:
                        down, up = weights[f"{path}.lora_A.weight"], weights[f"{path}.lora_B.weight"]
                        module.weight += _ALPHA[name] / _RANKS[name] * up @ down
            self._models[name] = merged
        self.base_model = base.base_model
        self.config = base.config

    def _of(self, inputs: dict[str, Any]) -> Any:
        if "image_pixel_values" in inputs:
            return self._models["vision"]
        return self._models["speech" if "audio_input_features" in inputs else ""]

    def __call__(self, **inputs: Any) -> Any:
        return self._of(inputs)(**inputs)

    def generate(self, **inputs: Any) -> Any:
        return self._of(inputs).generate(**inputs)


def _reference(folder: Path) -> tuple[Any, Any]:
    whole = folder / "whole" if (folder / "whole").is_dir() else folder
    processor = transformers.AutoProcessor.from_pretrained(whole)
    # its class loses it when it is saved
    processor.chat_template = processor.tokenizer.chat_template
    return Merged(whole), processor


FAMILIES = {
    "phi4_multimodal": Tiny(_native, ("image", "audio"), reference=_reference),
    "phi4mm": Tiny(_published, ("image", "audio"), reference=_reference),
}
