"""Real decoders shared by ranks give the tokens of transformers' generate, and of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_decoders import generate, greedy, prompts

from triptych.python_models.contract.errors import ErrorKind, TriptychError
from triptych.python_models.families import torchvision_fix

torchvision_fix.install()

import transformers  # noqa: E402

_TEXT: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MOE = _TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
CHECKPOINTS = {
    "experts whole": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _MOE, True),
    "experts split, shared expert": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _MOE | {"shared_expert_intermediate_size": 48},
        False,
    ),
    "one key head, tied head": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _TEXT | {"num_key_value_heads": 1, "tie_word_embeddings": True},
        False,
    ),
}


def saved(cls: str, config: str, values: dict[str, Any], folder: Path) -> Any:
    """A checkpoint whose logits are far from flat; the model."""
    model = getattr(transformers, cls)(getattr(transformers, config)(**values)).eval()
    generator = torch.Generator().manual_seed(0)
    # a tied head would say the last token again and again
    embed = 0.1 if values["tie_word_embeddings"] else 1.0
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            scale = 0.2 if tensor.dim() == 1 else embed if "embed" in name else tensor.shape[-1] ** -0.5
            tensor.copy_(
                torch.randn(tensor.shape, generator=generator) * scale + (tensor.dim() == 1 and "norm" in name)
            )
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_two_ranks_compute_what_transformers_does(make_group: Any, tmp_path: Path, kind: str) -> None:
    """Chunks of the prompt, decodes of tokens that only the device knows, rows of media."""
    cls, config, values, whole = CHECKPOINTS[kind]
    model = saved(cls, config, values, tmp_path)
    asked = prompts(4)
    expected = [generate(model, prompt, 10) for prompt in asked]
    assert len({token for tokens in expected for token in tokens}) > 10
    group = make_group(build="parallel_decoders:build", expert_parallel=whole, folder=str(tmp_path), cls=cls)
    with torch.inference_mode():
        assert greedy(group, asked, 10) == expected
        assert greedy(group, asked, 10, chunk=7) == expected
        rows = model.get_input_embeddings().weight[torch.tensor(asked[3][4:30])].detach()
        assert greedy(group, asked[3:], 10, chunk=16, media=((4, 30), rows)) == expected[3:]


def test_what_cannot_be_split_says_so(make_group: Any, tmp_path: Path) -> None:
    saved("Qwen2ForCausalLM", "Qwen2Config", _TEXT | {"num_attention_heads": 3, "num_key_value_heads": 3}, tmp_path)
    with pytest.raises(TriptychError, match="3 query and 3 key heads cannot be split over 2 ranks") as caught:
        make_group(build="parallel_decoders:build", folder=str(tmp_path), cls="Qwen2ForCausalLM")
    assert caught.value.kind is ErrorKind.UNSUPPORTED
