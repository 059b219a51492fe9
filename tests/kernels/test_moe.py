"""Mixture of experts: kernels against the reference, the reference against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from transformers import Ernie4_5_VLMoeConfig, Glm4vMoeConfig, Qwen3MoeConfig, Qwen3VLMoeConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeSparseMoeBlock
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeTextMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from triptych.kernels import moe
from triptych.kernels.moe import experts_reference, route_reference
from triptych.kernels.moe.kernel import _combine_kernel, _count_kernel, _grouped_kernel, _place_kernel, _route_kernel
from triptych.kernels.moe.launch import TABLE, Entry, Tile, _placed, launch_experts, launch_route, select

# tokens, experts, top k, groups, as families have them and odd ones
ROUTES = [
    (1, 128, 8, (1, 1)),
    (5, 6, 2, (1, 1)),
    (3, 5, 5, (1, 1)),
    (7, 16, 4, (4, 2)),
    (4, 15, 3, (5, 2)),
    (2, 12, 3, (3, 3)),
    (3, 8, 1, (8, 3)),
    (2, 1, 1, (1, 1)),
]


@pytest.mark.parametrize(("tokens", "count", "top_k", "groups"), ROUTES)
@pytest.mark.parametrize(
    ("scoring", "with_bias", "renormalise", "scale"),
    [("softmax", False, True, 1.0), ("softmax", True, False, 1.0), ("sigmoid", True, True, 2.5)],
)
def test_route_equals_the_reference(
    device, assert_close, tokens, count, top_k, groups, scoring, with_bias, renormalise, scale
):
    torch.manual_seed(count)
    # rows of a wider array
    logits = torch.randn(tokens, count + 3, device=device)[:, :count]
    # large enough that the biased choice is another
    bias = torch.randn(count, device=device) if with_bias else None
    weights, chosen = launch_route(logits, top_k, renormalise, scoring, bias, groups, scale)
    options = {"renormalise": renormalise, "scoring": scoring, "bias": bias, "groups": groups, "scale": scale}
    expected, expected_chosen = route_reference(logits, top_k, **options)
    assert torch.equal(chosen, expected_chosen)
    assert_close(weights, expected)


def test_route_takes_the_first_of_equal_ones(device):
    weights, chosen = launch_route(torch.zeros(2, 7, device=device), 3, True, "softmax", None, (1, 1), 1.0)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3))


# numpy's word for it in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_nan_names_experts_that_exist_and_stays_in_its_row(device, scoring):
    logits = torch.randn(3, 12, device=device)
    logits[1] = float("nan")
    weights, chosen = launch_route(logits, 3, True, scoring, None, (4, 2), 1.0)
    assert ((chosen >= 0) & (chosen < 12)).all()
    assert torch.isnan(weights[1]).all()
    assert not torch.isnan(weights[[0, 2]]).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scoring": "relu"}, "not one of softmax, sigmoid"),
        ({"groups": (3, 1)}, "1 of 3 groups of 8 experts"),
        ({"groups": (4, 5)}, "5 of 4 groups"),
        ({"top_k": 9}, "9 experts of 1 of 1 groups"),
        ({"top_k": 3, "groups": (4, 1)}, "3 experts of 1 of 4 groups"),
    ],
)
def test_route_refuses(wrong, message):
    options = {"top_k": 2, "renormalise": True, "scoring": "softmax", **wrong}
    with pytest.raises(ValueError, match=message):
        moe.route(torch.zeros(1, 8), **options)


def _tiny_module(family):
    """(module, arguments of route) of a family's MoE block with random weights, without its shared experts."""
    torch.manual_seed(0)
    if family == "qwen3":
        config = Qwen3MoeConfig(
            hidden_size=24, moe_intermediate_size=12, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False
        )
        made, router = Qwen3MoeSparseMoeBlock(config), {"renormalise": False, "scoring": "softmax"}
    elif family == "qwen3_vl":
        config = Qwen3VLMoeConfig(
            text_config={"hidden_size": 24, "moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3}
        ).text_config
        made, router = Qwen3VLMoeTextSparseMoeBlock(config), {"renormalise": True, "scoring": "softmax"}
    elif family == "glm4v":
        config = Glm4vMoeConfig(
            text_config={
                "hidden_size": 24,
                "moe_intermediate_size": 12,
                "n_routed_experts": 8,
                "num_experts_per_tok": 3,
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 1.5,
                "norm_topk_prob": True,
            }
        ).text_config
        made = Glm4vMoeTextMoE(config)
        router = {"renormalise": True, "scoring": "sigmoid", "groups": (4, 2), "scale": 1.5}
    else:
        config = Ernie4_5_VLMoeConfig(
            text_config={"hidden_size": 24, "moe_intermediate_size": [12, 8], "moe_num_experts": 8, "moe_k": 3}
        ).text_config
        made = Ernie4_5_VLMoeSparseMoeBlock(config, 12)
        router = {"renormalise": True, "scoring": "softmax"}
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    bias = None
    if family == "glm4v":
        bias = made.gate.e_score_correction_bias
    elif family == "ernie":
        bias = made.gate.moe_statics.e_score_correction_bias
    if bias is not None:
        torch.nn.init.normal_(bias)
        router["bias"] = bias.flatten()
    return made, router


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl", "glm4v", "ernie"])
@torch.no_grad()
def test_the_reference_is_what_transformers_computes(family):
    module, router = _tiny_module(family)
    x = torch.randn(9, 24)
    given = module.gate(x)
    logits = torch.nn.functional.linear(x, module.gate.weight)
    top_k = given[1].shape[1]
    weights, chosen = moe.route(logits, top_k, **router)
    # GLM's experts come in any order
    for row in range(len(x)):
        theirs = dict(zip(given[2][row].tolist(), given[1][row].tolist(), strict=True))
        ours = dict(zip(chosen[row].tolist(), weights[row].tolist(), strict=True))
        assert ours == pytest.approx(theirs, rel=1e-6)
    out = moe.experts(x, module.experts.gate_up_proj, module.experts.down_proj, weights, chosen, activation="silu")
    torch.testing.assert_close(out, module.experts(x, given[2], given[1]))


def _experts(device, dtype, tokens, count, top_k, hidden=40, ffn=24, *, chosen=None):
    torch.manual_seed(tokens * 100 + count)
    x = torch.randn(tokens, hidden + 8, device=device).to(dtype)[:, :hidden]
    gate_up = (torch.randn(count, 2 * ffn, hidden, device=device) / hidden**0.5).to(dtype)
    down = (torch.randn(count, hidden, ffn, device=device) / ffn**0.5).to(dtype)
    weights = torch.rand(tokens, top_k, device=device)
    if chosen is None:
        chosen = torch.rand(tokens, count, device=device).argsort(1)[:, :top_k]
    return x, gate_up, down, weights, chosen.to(device)


SMALL = Entry(16, Tile(16, 16, 4, 2), Tile(16, 16, 4, 2))
WIDE = Entry(32, Tile(32, 32, 4, 2), Tile(64, 32, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("entry", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize(("tokens", "count", "top_k"), [(1, 8, 2), (3, 5, 5), (17, 4, 2), (40, 3, 1), (2, 1, 1)])
def test_experts_equal_the_reference(device, assert_close, dtype, entry, tokens, count, top_k):
    given = _experts(device, dtype, tokens, count, top_k)
    for activation in ("silu", "gelu_tanh"):
        out = launch_experts(*given, activation, 0, entry)
        assert_close(out, experts_reference(*given, activation=activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_tiles_do_not_divide(device, assert_close, dtype):
    given = _experts(device, dtype, 5, 4, 2, hidden=37, ffn=13)
    # in bfloat16 the interpreter cuts off instead of rounding: only that it runs and is near
    given = tuple(value.float() if dtype == torch.float32 and value.is_floating_point() else value for value in given)
    out = launch_experts(*given, "silu", 0, WIDE)
    expected = experts_reference(*given, activation="silu")
    if dtype == torch.float32:
        assert_close(out, expected)
    else:
        assert ((out - expected).float().square().mean() / expected.float().square().mean()).sqrt() < 0.03


@pytest.mark.parametrize(
    "chosen",
    [[[2, 0]] * 37, [[0, 1]] * 36 + [[4, 3]], [[i % 5, (i + 1) % 5] for i in range(16)] + [[1, 2]]],
    ids=["two", "one_alone", "one_more_than_a_slot"],
)
@pytest.mark.parametrize("first", [0, 1, -2])
def test_crowded_and_empty_experts_and_those_elsewhere(device, assert_close, chosen, first):
    """``first`` 1 and -2: experts 0, and 3 and 4, are on another rank."""
    given = _experts(device, torch.float32, len(chosen), 5, 2, chosen=torch.tensor(chosen))
    out = launch_experts(*given, "silu", first, SMALL)
    expected = experts_reference(*given, activation="silu", first_expert=first)
    assert_close(out, expected)
    assert (first == 0) == torch.allclose(expected, experts_reference(*given, activation="silu"))


def test_the_parts_of_two_ranks_add_up(device, assert_close):
    x, gate_up, down, weights, chosen = _experts(device, torch.float32, 6, 6, 3)
    parts = [
        launch_experts(x, gate_up[rank : rank + 3], down[rank : rank + 3], weights, chosen, "silu", rank)
        for rank in (0, 3)
    ]
    assert_close(parts[0] + parts[1], experts_reference(x, gate_up, down, weights, chosen, activation="silu"))


def test_nobody_here(device):
    x, gate_up, down, weights, chosen = _experts(device, torch.float32, 3, 4, 2)
    out = launch_experts(x, gate_up, down, weights, chosen, "silu", 100)
    assert torch.equal(out, torch.zeros_like(x))
    assert launch_experts(x[:0], gate_up, down, weights[:0], chosen[:0], "silu", 0).shape == (0, 40)


@pytest.mark.parametrize(("pairs", "top_k"), [(10, 2), (1026, 3)])
def test_every_pair_has_its_place(device, pairs, top_k):
    """The second number is past what programs count by themselves."""
    torch.manual_seed(pairs)
    chosen = torch.randint(0, 7, (pairs // top_k, top_k), device=device)
    # experts 2 to 5 are here
    order, slots = _placed(chosen, 4, 2, 16, False)
    flat = chosen.flatten()
    here = [pair for expert in range(2, 6) for pair in (flat == expert).nonzero().flatten().tolist()]
    assert order[: len(here)].tolist() == here
    found = []
    for expert, begin, end in slots.T.tolist():
        if expert >= 0:
            assert begin < end
            mine = order[begin : min(begin + 16, end)].tolist()
            assert {int(flat[pair]) for pair in mine} == {expert + 2}
            found += mine
    assert found == here


def test_nan_stays_in_its_row(device):
    given = _experts(device, torch.float32, 4, 3, 2)
    given[0][2, 5] = float("nan")
    bad = torch.isnan(launch_experts(*given, "silu", 0)).any(1)
    assert bad.tolist() == [False, False, True, False]


def test_experts_refuse():
    x, gate_up, down, weights, chosen = _experts("cpu", torch.float32, 3, 4, 2)
    with pytest.raises(ValueError, match="not one of"):
        moe.experts(x, gate_up, down, weights, chosen, activation="relu")
    with pytest.raises(ValueError, match="do not fit each other"):
        moe.experts(x[:, :8], gate_up, down, weights, chosen, activation="silu")
    with pytest.raises(ValueError, match="do not fit 3 tokens"):
        moe.experts(x, gate_up, down, weights[:2], chosen[:2], activation="silu")


def test_the_table_ascends():
    most = [pairs for pairs, _ in TABLE]
    assert most == sorted(most)
    assert select(8, 128).block_m == 16
    assert select(2048 * 8, 128).block_m == 128


@pytest.mark.parametrize("entry", [entry for _, entry in TABLE], ids=lambda entry: f"m{entry.block_m}")
@pytest.mark.parametrize("gate", ["silu", ""])
def test_grouped_compiles_for_the_h200(compile_sm90, entry, gate):
    """Qwen3-VL-30B-A3B: hidden 2048, ffn 768."""
    tile = entry.up if gate else entry.down
    built = compile_sm90(
        _grouped_kernel,
        {
            **dict.fromkeys(("x", "weight", "out"), "*bf16:16"),
            **({} if gate else {"scales": "*fp32:16"}),
            **dict.fromkeys(("order", "slot_expert", "slot_begin", "slot_end"), "*i32:16"),
            **dict.fromkeys(("x_row", "expert_stride", "weight_row", "count_n"), "i32:16"),
        },
        {
            **({"scales": None} if gate else {}),
            "K": 2048 if gate else 768,
            "DIVISOR": 8 if gate else 1,
            "BLOCK_M": entry.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GATE": gate,
            "UPCAST": False,
            "PDL": True,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=True,
    )
    assert built.spilled == 0
    assert built.shared <= 227 * 1024
    assert "wgmma" in built.ptx


@pytest.mark.parametrize(("count", "top_k", "groups"), [(128, 8, (1, 1)), (256, 8, (8, 4)), (64, 6, (1, 1))])
def test_route_compiles_for_the_h200(compile_sm90, count, top_k, groups):
    built = compile_sm90(
        _route_kernel,
        {"logits": "*fp32:16", "bias": "*fp32:16", "weights": "*fp32:16", "experts": "*i64:16", "logits_row": "i32:16",
         "scale": "fp32"},
        {
            "EXPERTS": count,
            "TOP_K": top_k,
            "GROUPS": groups[0],
            "TOP_GROUPS": groups[1],
            "BLOCK_GROUPS": groups[0],
            "BLOCK_SIZE": count // groups[0],
            "BLOCK_TOP": 8,
            "SIGMOID": groups[0] > 1,
            "RENORMALISE": True,
            "PDL": True,
        },
        num_warps=1,
        launch_pdl=True,
    )  # fmt: skip
    assert built.spilled == 0


def test_the_small_kernels_compile_for_the_h200(compile_sm90):
    int32 = dict.fromkeys(("order", "slot_expert", "slot_begin", "slot_end"), "*i32:16")
    scalars = dict.fromkeys(("first_expert", "pairs", "slots"), "i32")
    for counts in ({"counts": "*i32:16"}, {}):
        built = compile_sm90(
            _place_kernel,
            {"experts": "*i64:16", **counts, **int32, **scalars},
            {
                **({} if counts else {"counts": None}),
                "EXPERTS": 128,
                "BLOCK_EXPERTS": 128,
                "BLOCK_M": 16,
                "BLOCK": 1024,
                "COUNT_BLOCK": 32,
                "PDL": True,
            },
            num_warps=4,
            launch_pdl=True,
        )
        assert built.spilled == 0
    assert not compile_sm90(
        _count_kernel,
        {"experts": "*i64:16", "counts": "*i32:16", "first_expert": "i32", "pairs": "i32"},
        {"BLOCK": 1024, "PDL": True},
        num_warps=4,
        launch_pdl=True,
    ).spilled
    assert not compile_sm90(
        _combine_kernel,
        {"parts": "*bf16:16", "experts": "*i64:16", "out": "*bf16:16", "width": "i32:16", "first_expert": "i32"},
        {"EXPERTS": 128, "TOP_K": 8, "BLOCK": 1024, "PDL": True},
        num_warps=4,
        launch_pdl=True,
    ).spilled
