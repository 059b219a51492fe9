"""Vision transformers whose weights a checkpoint stores under the names of timm (huggingface/pytorch-image-models).

They have one matrix for queries, keys and values, and positions with a batch dimension.
"""

from __future__ import annotations

from typing import Any


def timm_rules(old: str, new: str, output: str) -> list[Any]:
    """transformers' rules from timm's names to those of its towers of SigLIP's shape.

    Args:
        old: pattern of what stands before timm's names.
        new: what stands before transformers'.
        output: transformers' name of what follows attention.
    """
    from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming

    class Squeeze(ConversionOps):
        """[1, ...] -> [...]."""

        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
            """See the base class."""
            (tensor,) = input_dict.values()
            return {target_patterns[0]: (tensor[0] if isinstance(tensor, list) else tensor).squeeze(0)}

    layer, embeddings, attention = rf"{new}.encoder.layers.\1", f"{new}.embeddings", "self_attn"
    renamings = [
        (rf"{old}\.patch_embed\.proj\.", f"{embeddings}.patch_embedding."),
        (rf"{old}\.pos_embed", f"{embeddings}.pos_embed"),
        (rf"{old}\.blocks\.(\d+)\.norm1\.", f"{layer}.layer_norm1."),
        (rf"{old}\.blocks\.(\d+)\.norm2\.", f"{layer}.layer_norm2."),
        (rf"{old}\.blocks\.(\d+)\.attn\.qkv\.", f"{layer}.{attention}.qkv."),
        (rf"{old}\.blocks\.(\d+)\.attn\.proj\.", f"{layer}.{attention}.{output}."),
        (rf"{old}\.blocks\.(\d+)\.mlp\.", f"{layer}.mlp."),
        (rf"{old}\.norm\.", f"{new}.post_layernorm."),
    ]
    parts = [f"{attention}.{part}_proj" for part in "qkv"]
    return [
        *(WeightRenaming(*names) for names in renamings),
        WeightConverter("embeddings.pos_embed", "embeddings.position_embedding.weight", [Squeeze()]),
        *(
            WeightConverter(f"{attention}.qkv.{kind}", [f"{part}.{kind}" for part in parts], [Chunk(0)])
            for kind in ("weight", "bias")
        ),
    ]
