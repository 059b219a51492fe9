"""What the generic adapter makes of every model type of transformers that has no family of its own.

Language models run in a tiny size: the same tokens as ``generate``, or refused by name. Shapes are found by replacing
what a configuration has in common with others; what cannot be made small that way is skipped. Of models with media,
whose processors need files, it is the rules that are asked; :mod:`tiny.generic` makes some of them.

Part of ``make parity`` only: it runs with ``--families all`` or ``--families generic``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.contract.plan import Plan
from triptych.python_models.contract.request import Message, TextPart
from triptych.python_models.contract.sampling import SamplingParams
from triptych.python_models.contract.settings import Settings
from triptych.python_models.families import generic, generic_rules, registry
from triptych.python_models.language_model.stage import LanguageModelStage
from triptych.python_models.stage import NoTelemetry

NEW_TOKENS = 12
MAX_PARAMETERS = 6e6
TEXTS = ("hello world, what is shown?", "numbers 0123456789 " * 5, "hi", "the quick brown fox jumps. " * 6)
# Those that are wanted for certain: refusing one of them is a failure.
WANTED = """
    afmoe apertus arcee axk1 bitnet cohere cohere2 cwm deepseek_v3 exaone4 gemma gemma2 glm glm4 glm4_moe
    gpt2 gpt_neox gpt_oss granite granitemoe helium llama ministral3 mistral mixtral olmo olmo2 olmo3 olmoe
    phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2
"""
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 3,
    "max_position_embeddings": 512,
    "n_positions": 512,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "attention_heads"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "window_size": 16,
    "rotary_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
}
MARKS = ("pad_token_id", "bos_token_id", "eos_token_id")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    types: frozenset[str] = frozenset()
    if {"all", "generic"} & {*metafunc.config.getoption("--families").split(",")}:
        types = generic.known_model_types("MULTIMODAL_LM")
        if "folder" in metafunc.fixturenames:
            types = generic.known_model_types("CAUSAL_LM") - types
    metafunc.parametrize("model_type", sorted(types - {*registry.supported_model_types()}))


def make_small(model_type: str) -> Any:
    """A model of a few layers, on the meta device until it is known to be small."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    standard = config_class()
    sizes = {
        name: size
        for name, size in SIZES.items()
        if name not in getattr(config_class, "attribute_map", {})
        and hasattr(standard, name)
        and (getattr(standard, name) is not None or name in MARKS)
    }
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)
    kinds = list(dict.fromkeys(getattr(standard, "layer_types", None) or ()))
    if len(kinds) > 1:
        sizes["layer_types"] = (kinds * 4)[:4]
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    config = config_class(**sizes)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert count < MAX_PARAMETERS, f"{count / 1e6:.0f} million parameters"
    torch.manual_seed(0)
    return model_class(config).eval()


@pytest.fixture
def folder(model_type: str, tmp_path: Path, pytestconfig: pytest.Config) -> Path:
    import transformers

    pytestconfig.tiny_builder()  # type: ignore[attr-defined]
    common, qwen = (importlib.import_module(f"tiny.{name}") for name in ("common", "qwen"))

    try:
        model = make_small(model_type)
        with torch.no_grad():
            model(torch.arange(10, 20)[None])
    except Exception as error:  # noqa: BLE001 - whatever a configuration says to sizes it was not made for
        pytest.skip(f"no small configuration: {str(error).strip().splitlines()[0] if str(error) else error!r}")
    common.draw_weights(model)
    tokenizer = qwen.make_tokenizer()
    tokenizer.chat_template = qwen.TEMPLATE
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_same_tokens_or_refused(
    folder: Path, model_type: str, new_answer: Callable[[], Any], record_property: Callable[[str, object], None]
) -> None:
    settings = Settings(
        model=str(folder), device="cpu", kv_cache_tokens=2048, block_size=4, chunked_prefill_size=16, torch_threads=1
    )
    try:
        preprocessor = registry.load_family(settings).load_preprocessor()
        stage = LanguageModelStage(settings, NoTelemetry(), "cpu")
    except TriptychError as error:
        if error.kind is not ErrorKind.UNSUPPORTED or model_type in WANTED.split():
            raise
        record_property("refused", error.message.replace(f"{folder} is not supported because ", ""))
        return
    try:
        answers = []
        for text in TEXTS:
            prepared = preprocessor.prepare([Message("user", (TextPart(text),), plain=True)], [])
            sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=True)
            plan = Plan(prepared.items, sampling, prepared.rope_delta, prepared.extras)
            answer = new_answer()
            inputs = {"input_ids": prepared.input_ids, "position_ids": prepared.position_ids}
            stage.submit(text, {**inputs, "plan": [plan.to_json().encode()]}, answer)
            answers.append((prepared.input_ids, answer))
        whole = reference(folder)
        for ids, answer in answers:
            deltas = answer.result()
            tokens = [token for delta in deltas for token in delta.token_ids]
            expected, logprobs = generate(whole, torch.from_numpy(ids.astype("int64"))[None])
            assert without_end(tokens) == without_end(expected)
            found = [one for delta in deltas for one in delta.logprobs]
            assert [one.logprob for one in found] == pytest.approx(
                [float(logprobs[k, one.token_id]) for k, one in enumerate(found)], abs=1e-3
            )
    finally:
        stage.close()


def reference(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def generate(whole: Any, ids: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    out = whole.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).float().log_softmax(-1)


def without_end(tokens: list[int]) -> list[int]:
    end = SIZES["eos_token_id"]
    return tokens[:-1] if tokens and tokens[-1] == end else tokens


def test_the_rules_take_or_refuse_what_has_media(
    model_type: str, record_property: Callable[[str, object], None]
) -> None:
    """By each type's own standard configuration, on the meta device."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    try:
        with torch.device("meta"):
            model = transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING[config_class](config_class())
    except Exception as error:  # noqa: BLE001 - some have no standard configuration, some want other packages
        pytest.skip(f"no standard configuration: {str(error).strip().splitlines()[0]}")
    try:
        generic_rules.head_of(model)
        if type(model).__name__.endswith("ForCausalLM") and not hasattr(model.base_model, "get_image_features"):
            # of text alone, though it stands among the others
            assert generic_rules.text_model_of(model) is not model
            return
        modalities, parts = generic_rules.multimodal_parts(model)
    except generic_rules.UnfitError as error:
        record_property("refused", str(error))
        return
    assert modalities
    for part in parts:
        assert next(model.base_model.get_submodule(part).parameters(), None) is not None
    assert model.get_decoder() is not model.base_model
