"""What config.json of a published LLaVA or InternVL says, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families.checkpoint import Checkpoint
from triptych.python_models.families.llava_original import Published, original
from triptych.python_models.families.loading import meta_model
from triptych.python_models.families.registry import load_family
from triptych.python_models.families.templates import TEMPLATES

CLIP = "openai/clip-vit-large-patch14-336"
SIGLIP = "google/siglip-so400m-patch14-384"
# what the published config.json say, as far as it tells one from another
V1_5 = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "image_aspect_ratio": "pad",
    "vocab_size": 32000,
}
PUBLISHED: dict[str, tuple[dict[str, Any], str, str]] = {
    "llava-v1.5-13b": (V1_5, "OriginalLlava", "vicuna_v1.1"),
    "llava-v1.6-vicuna-7b": (V1_5 | {"image_aspect_ratio": "anyres"}, "OriginalNext", "vicuna_v1.1"),
    "llava-v1.6-mistral-7b": (
        V1_5 | {"model_type": "llava_mistral", "image_aspect_ratio": "anyres"},
        "OriginalNext",
        "llava_mistral_instruct",
    ),
    "llava-v1.6-34b": (
        V1_5 | {"model_type": "llava_llama", "image_aspect_ratio": "anyres", "vocab_size": 64000},
        "OriginalNext",
        "chatml_direct",
    ),
    "llama3-llava-next-8b": (
        V1_5 | {"model_type": "llava_llama", "image_aspect_ratio": "anyres", "vocab_size": 128256},
        "OriginalNext",
        "llava_llama_3",
    ),
    "llava-next-72b": (
        V1_5 | {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "image_aspect_ratio": "anyres"},
        "OriginalNext",
        "chatml-llava",
    ),
    "LLaVA-NeXT-Video-7B": (
        V1_5 | {"image_aspect_ratio": "anyres", "mm_resampler_type": "spatial_pool"},
        "OriginalNextVideo",
        "vicuna_v1.1",
    ),
    "llava-onevision-qwen2-7b-ov": (
        V1_5
        | {"architectures": ["LlavaQwenForCausalLM"], "image_aspect_ratio": "anyres_max_9", "mm_vision_tower": SIGLIP}
        | {"mm_spatial_pool_mode": "bilinear"},
        "OriginalOnevision",
        "chatml-llava",
    ),
}


def published(raw: dict[str, Any], folder: Path = Path("nowhere")) -> Published:
    whole = {"mm_vision_tower": CLIP, "mm_projector_type": "mlp2x_gelu"} | raw
    return Published(Checkpoint(folder, whole), Settings())


@pytest.mark.parametrize("name", PUBLISHED)
def test_generations(name: str) -> None:
    raw, family, template = PUBLISHED[name]
    assert published(raw).template == TEMPLATES[template]
    assert type(original(Checkpoint(Path("nowhere"), raw), Settings())).__name__ == family


def test_canvases_are_published_as_width_and_height() -> None:
    assert published({"image_grid_pinpoints": [[336, 672], [1008, 336]]}).pinpoints == [[672, 336], [336, 1008]]
    assert published({"image_grid_pinpoints": "[(336, 672), (672, 336)]"}).pinpoints == [[672, 336], [336, 672]]
    ranges = published({"image_grid_pinpoints": "(1x1),...,(6x6)", "mm_vision_tower": SIGLIP}).pinpoints
    assert len(ranges) == 36
    assert ranges[:2] == [[384, 384], [768, 384]]
    assert ranges[-1] == [2304, 2304]


def test_sizes_of_the_published_towers() -> None:
    clip, siglip = published({}), published({"mm_vision_tower": SIGLIP})
    assert (clip.side, clip.patch, clip.full) == (336, 14, False)
    assert (siglip.side, siglip.patch, siglip.full) == (384, 14, True)
    assert published({"mm_vision_select_feature": "cls_patch"}).full


@pytest.mark.parametrize("raw", [{"mm_projector_type": "linear"}, {"mm_use_im_start_end": True}])
def test_older_generations_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(TriptychError, match="supported is 'mlp2x_gelu' without it") as caught:
        published(raw)
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def refused(folder: Path, part: str) -> TriptychError:
    def load() -> None:
        family: Any = load_family(Settings(model=str(folder)))
        if part == "preprocessor":
            family.load_preprocessor()
        else:
            family.load_encoder("vision", "cpu", torch.float32)

    with pytest.raises(TriptychError) as caught:
        load()
    return caught.value


@pytest.fixture
def copied(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A tiny checkpoint with other values in its config.json."""

    def copy(name: str, **values: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint(name), folder)
        raw = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return copy


def test_a_missing_tower_is_named(copied: Callable[..., Path]) -> None:
    folder = copied("llava_v1_5", mm_vision_tower="../elsewhere/tower")
    error = refused(folder, "encoder")
    assert error.kind is ErrorKind.MODEL_NOT_FOUND
    assert "'../elsewhere/tower' (mm_vision_tower in config.json)" in error.message
    assert "let mm_vision_tower name its folder" in error.message


def test_a_tower_without_weights_is_named(copied: Callable[..., Path]) -> None:
    folder = copied("llava_v1_5")
    for file in (folder / "tower").glob("pytorch_model*"):
        file.unlink()
    error = refused(folder, "encoder")
    assert error.kind is ErrorKind.MODEL_NOT_FOUND
    assert str(folder / "tower") in error.message


def test_a_tower_of_another_kind_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied("llava_v1_5")
    (folder / "tower" / "config.json").write_text(json.dumps({"model_type": "eva", "image_size": 32, "patch_size": 8}))
    error = refused(folder, "preprocessor")
    assert error.kind is ErrorKind.UNSUPPORTED
    assert "'tower' is of type 'eva'; CLIP and SigLIP are supported" in error.message


def test_a_tokenizer_model_needs_its_package(copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As LLaVA 1.5 and InternVL with InternLM 2 have it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    folder = copied("llava_v1_5")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    error = refused(folder, "preprocessor")
    assert error.kind is ErrorKind.MODEL_NOT_FOUND
    assert "it needs the packages sentencepiece and protobuf" in error.message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ps_version": "v1"}, "InternVL from version 2 on is supported"),
        ({"template": "internvl_zh"}, "the conversation format 'internvl_zh', which is unknown"),
        ({"use_thumbnail": False}, "only tiles beside the whole picture are supported"),
    ],
)
def test_other_internvl_are_refused(copied: Callable[..., Path], values: dict[str, Any], message: str) -> None:
    error = refused(copied("internvl3_published", **values), "preprocessor")
    assert error.kind is ErrorKind.UNSUPPORTED
    assert message in error.message


def test_one_tile_where_pictures_are_not_cut(copied: Callable[..., Path]) -> None:
    family: Any = load_family(Settings(model=str(copied("internvl3_published", dynamic_image_size=False))))
    assert family.load_preprocessor().processor.image_processor.max_patches == 1


@pytest.mark.parametrize("name", ["llava_v1_5", "llava_next_qwen", "internvl2_internlm2", "internvl2_phi3"])
def test_slices_of_published_weights(tiny_checkpoint: Callable[[str], Path], name: str) -> None:
    """Files of torch.save and fused matrices too: each weight as transformers' own loading has it."""
    family: Any = load_family(Settings(model=str(tiny_checkpoint(name))))
    decoder = family.load_decoder("cpu", torch.float32)
    _, source = family.open_decoder("cpu", torch.float32, progress=False)
    for key, value in decoder.text_model.state_dict().items():
        assert torch.equal(source.get(key), value), key
    head = decoder.lm_head.weight
    assert torch.equal(source.get("lm_head.weight", 0, 3, 9), head[3:9])
    source.close()


def test_tokens_that_end_an_answer(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Those of the conversation format, where generation_config.json names none."""
    family: Any = load_family(Settings(model=str(tiny_checkpoint("internvl2_internlm2"))))
    decoder = family.load_decoder("cpu", torch.float32)
    assert decoder.tokenizer.convert_tokens_to_ids("<|im_end|>") in decoder.eos_token_ids


# config.json as published, shortened to what a family reads; parameters of the whole in thousands of millions
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
_QWEN2 = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_MM = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": CLIP,
}
_CHAT = {
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "force_image_size": 448,
    "ps_version": "v2",
    "select_layer": -1,
    "vision_config": {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 448,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-06,
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}
_INTERNLM2 = {
    "model_type": "internlm2",
    "bias": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 92553,
}
SIZES: dict[str, tuple[dict[str, Any], float]] = {
    "liuhaotian/llava-v1.5-7b": (_LLAMA | _MM | {"model_type": "llava", "image_aspect_ratio": "pad"}, 7.063),
    "liuhaotian/llava-v1.6-mistral-7b": (
        _LLAMA
        | _MM
        | {"model_type": "llava_mistral", "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[336, 672]]}
        | {"num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": None, "rope_theta": 1000000.0},
        7.566,
    ),
    "lmms-lab/llava-onevision-qwen2-7b-ov": (
        _QWEN2
        | _MM
        | {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "mm_vision_tower": SIGLIP}
        | {"image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "(1x1),...,(6x6)"},
        8.030,
    ),
    "OpenGVLab/InternVL2-8B": (_CHAT | {"template": "internlm2-chat", "llm_config": _INTERNLM2}, 8.075),
    "OpenGVLab/InternVL3-8B": (
        _CHAT | {"template": "internvl2_5", "llm_config": _QWEN2 | {"model_type": "qwen2", "vocab_size": 151674}},
        7.944,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(tmp_path: Path, name: str) -> None:
    """The model that a published config.json describes has as many parameters as the checkpoint; no weights needed."""
    raw, billions = SIZES[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    family: Any = load_family(Settings(model=str(tmp_path)))
    model = meta_model(family.load_class(), family.load_config())
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)
    rope = model.config.get_text_config().rope_parameters
    assert rope["rope_type"] == "default"
