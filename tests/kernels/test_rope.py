"""Rotation and KV write: the kernel against the reference, the reference against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as glm_rotate
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotate

from triptych.kernels.rope import rope_table, rope_table_reference, rotate_and_store_reference, store_reference
from triptych.kernels.rope.kernel import _rotate_kernel, _store_kernel, _table_kernel
from triptych.kernels.rope.launch import launch_rotate, launch_store, launch_table

FP8 = torch.float8_e4m3fn


def _pages(blocks, heads, size, width, dtype, device):
    """Two arrays of pages full of NaN."""
    wide = torch.full((2, blocks, heads, size, width), float("nan"), device=device)
    return wide.to(dtype).unbind(0)


def _bits(pages):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return pages.contiguous().view(kinds[pages.element_size()])


def _assert_same_float8(got, want, device):
    """Equal bits; in the interpreter in most places: it loses the carry of rounding up, and NaN."""
    same = _bits(got) == _bits(want)
    if device == "cuda":
        near = (got.float() - want.float()).abs() <= want.float().abs() / 8 + 2**-9
        # a last bit of float32 may tip a value over to the neighbouring float8
        assert same.float().mean() > 0.99
        assert (same | near).all()
    else:
        assert same.float().mean() > 0.95
    # untouched pages hold NaN
    assert 0.1 < got.float().isnan().float().mean() < 1


def _inputs(device, dtype, tokens, heads, kv_heads, width, half, norm):
    torch.manual_seed(0)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width + 16, device=device).to(dtype)[:, :-16]
    angles = torch.randn(tokens, half, device=device) * 3
    options = {"num_heads": heads, "num_kv_heads": kv_heads}
    if norm:
        options["query_norm"] = torch.randn(width, device=device).to(dtype)
        options["key_norm"] = torch.randn(width, device=device).to(dtype)
    # tokens in any order over blocks of 4, one of them of no request
    slots = torch.randperm(4 * tokens + 4, device=device)[:tokens]
    slots[tokens // 2] = -1
    return qkv, angles.cos(), angles.sin(), slots, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width", "half"),
    [
        (1, 4, 4, 64, 32),
        (2, 7, 1, 80, 40),
        (17, 4, 1, 96, 16),
        (3, 8, 2, 128, 64),
        (65, 2, 1, 256, 128),
        (2, 28, 4, 16, 4),
    ],
)
@pytest.mark.parametrize(("interleaved", "offset"), [(False, None), (True, None), (False, 0.0), (True, 1.0)])
def test_equals_the_reference(device, assert_close, dtype, tokens, heads, kv_heads, width, half, interleaved, offset):
    qkv, cos, sin, slots, options = _inputs(device, dtype, tokens, heads, kv_heads, width, half, offset is not None)
    options |= {"interleaved": interleaved, "norm_offset": offset or 0.0}
    pages = _pages(tokens + 1, kv_heads, 4, width, dtype, device)
    expected_pages = _pages(tokens + 1, kv_heads, 4, width, dtype, device)
    query = launch_rotate(qkv, cos, sin, *pages, slots, **options)
    expected = rotate_and_store_reference(qkv, cos, sin, *expected_pages, slots, **options)
    assert query.is_contiguous()
    assert_close(query, expected)
    for got, want in zip(pages, expected_pages, strict=True):
        # written exactly where the reference writes
        assert torch.equal(got.isnan(), want.isnan())
        assert got.isnan().any()
        assert_close(got.nan_to_num(0), want.nan_to_num(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rotation_copies(device, dtype):
    qkv, _, _, slots, options = _inputs(device, dtype, 5, 4, 2, 64, 32, False)
    pages = _pages(6, 2, 4, 64, dtype, device)
    expected_pages = _pages(6, 2, 4, 64, dtype, device)
    query = launch_rotate(qkv, None, None, *pages, slots, **options)
    expected = rotate_and_store_reference(qkv, None, None, *expected_pages, slots, **options)
    assert torch.equal(query, expected)
    assert torch.equal(query, qkv.unflatten(1, (8, 64))[:, :4])
    for got, want in zip(pages, expected_pages, strict=True):
        assert torch.equal(_bits(got), _bits(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_pages_hold_scaled_clamped_values(device, dtype):
    qkv, cos, sin, slots, options = _inputs(device, dtype, 9, 4, 2, 64, 32, True)
    # beyond what float8 holds, and a NaN that must stay one
    qkv[2] *= 1000
    qkv[3, -1] = float("nan")
    slots[3] = 4 * 9 + 3
    options |= {"key_scale": 0.02, "value_scale": 0.5}
    pages, expected_pages = _pages(10, 2, 4, 64, FP8, device), _pages(10, 2, 4, 64, FP8, device)
    launch_rotate(qkv, cos, sin, *pages, slots, **options)
    rotate_and_store_reference(qkv, cos, sin, *expected_pages, slots, **options)
    for got, want in zip(pages, expected_pages, strict=True):
        _assert_same_float8(got, want, device)
    assert (pages[1].float().nan_to_num(0).abs() == 448).any()
    if device == "cuda":
        assert pages[1].float()[9, 1, 3, -1].isnan()


@pytest.mark.parametrize("page_dtype", [None, FP8])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (96, 80), (192, 128)])
@pytest.mark.parametrize("tokens", [1, 6])
def test_store(device, page_dtype, width, value_width, tokens):
    torch.manual_seed(0)
    # as transformers' layers hand them over: [Hk, T, D], transposed
    key = torch.randn(3, tokens, width, device=device).transpose(0, 1)
    value = torch.randn(3, tokens, value_width, device=device).transpose(0, 1)
    slots = torch.randperm(4 * tokens + 4, device=device)[:tokens]
    slots[tokens // 2] = -1 if tokens > 1 else 5
    both = []
    for run in (launch_store, store_reference):
        key_pages, _ = _pages(tokens + 1, 3, 4, width, page_dtype or torch.float32, device)
        value_pages, _ = _pages(tokens + 1, 3, 4, value_width, page_dtype or torch.float32, device)
        run(key, value, key_pages, value_pages, slots, key_scale=0.25, value_scale=2.0)
        both.append((key_pages, value_pages))
    for got, want in zip(*both, strict=True):
        if page_dtype is None:
            assert torch.equal(_bits(got), _bits(want))
        else:
            _assert_same_float8(got, want, device)


@pytest.mark.parametrize(("axes", "half"), [(1, 32), (1, 24), (3, 64)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_table(device, assert_close, axes, half, tokens):
    torch.manual_seed(0)
    positions = torch.randint(0, 100_000, (axes, tokens), device=device)
    inv_freq = 1e4 ** -(torch.arange(half, device=device) / half)
    axis = torch.randint(0, axes, (half,), device=device)
    got = launch_table(positions, inv_freq, axis, 1.25)
    want = rope_table_reference(positions, inv_freq, axis, 1.25)
    for actual, expected in zip(got, want, strict=True):
        assert_close(actual, expected)


def test_rotation_of_the_reference_is_transformers_own():
    """Bit for bit in float32, with the layout of Llama, and of GLM, which rotates half of a head in pairs."""
    qkv, _, _, slots, options = _inputs("cpu", torch.float32, 5, 4, 2, 32, 16, True)
    slots = torch.arange(5)
    query_module, key_module = LlamaRMSNorm(32, eps=1e-6), LlamaRMSNorm(32, eps=1e-6)
    query_module.weight.data, key_module.weight.data = options["query_norm"], options["key_norm"]
    query, key, value = qkv.unflatten(1, (8, 32)).split([4, 2, 2], dim=1)
    query, key = query_module(query).transpose(0, 1)[None], key_module(key).transpose(0, 1)[None]
    for rotate, half, interleaved in ((llama_rotate, 16, False), (glm_rotate, 8, True)):
        inv_freq = 1e4 ** -(torch.arange(half) / half)
        cos, sin = rope_table(torch.arange(5)[None], inv_freq, torch.zeros(half, dtype=torch.int64), 1.0)
        wide = [torch.cat([x, x], dim=-1)[None] for x in (cos, sin)]
        want_query, want_key = rotate(query, key, *wide)
        pages = _pages(2, 2, 4, 32, torch.float32, "cpu")
        got = rotate_and_store_reference(qkv, cos, sin, *pages, slots, interleaved=interleaved, **options)
        assert torch.equal(got.transpose(0, 1)[None], want_query)
        stored = [p.transpose(1, 2).flatten(0, 1)[:5] for p in pages]
        assert torch.equal(stored[0].transpose(0, 1)[None], want_key)
        assert torch.equal(stored[1], value)


def test_refuses_what_does_not_fit(device):
    pages = _pages(2, 2, 4, 32, torch.float32, device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="does not fit pages"):
        launch_rotate(torch.zeros(1, 7 * 32, device=device), None, None, *pages, slots, num_heads=3, num_kv_heads=1)
    table = torch.zeros(1, 32, device=device)
    with pytest.raises(ValueError, match="cannot rotate 64 of 32"):
        launch_rotate(torch.zeros(1, 8 * 32, device=device), table, table, *pages, slots, num_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match="do not fit pages"):
        launch_store(*torch.zeros(2, 1, 2, 16, device=device).unbind(0), *pages, slots)


_STRIDES = ("key_block", "key_head", "key_slot", "value_block", "value_head", "value_slot", "block_size")


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("page", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize(
    ("width", "half", "interleaved", "norm"),
    [(128, 64, False, True), (128, 32, True, False), (256, 128, False, True), (80, 40, False, True)],
)
def test_rotation_compiles_for_the_h200(compile_sm90, heads, page, width, half, interleaved, norm):
    names = ("qkv", "query", *(("query_norm", "key_norm") if norm else ()))
    built = compile_sm90(
        _rotate_kernel,
        {
            **dict.fromkeys(names, "*bf16:16"),
            **dict.fromkeys(("cos", "sin"), "*fp32:16"),
            "slots": "*i64:16",
            **dict.fromkeys(("key_pages", "value_pages"), f"*{page}:16"),
            **dict.fromkeys(("qkv_row", "table_row", *_STRIDES), "i32:16"),
            **dict.fromkeys(("eps", "offset", "key_scale", "value_scale"), "fp32"),
        },
        {
            **({} if norm else {"query_norm": None, "key_norm": None}),
            "NUM_HEADS": 28,
            "NUM_KV_HEADS": 4,
            "WIDTH": width,
            "HALF": half,
            "BLOCK_HALF": 1 << (half - 1).bit_length(),
            "BLOCK_REST": 1 << max(width - 2 * half - 1, 0).bit_length(),
            "BLOCK_HEADS": heads,
            "INTERLEAVED": interleaved,
            "GEMMA": False,
            "FP8": page != "bf16",
            "PDL": True,
        },
        num_warps=max(heads * width // 256, 1) if width != 80 else 2,
        launch_pdl=True,
    )
    assert built.spilled == 0
    assert "griddepcontrol.wait" in built.ptx


@pytest.mark.parametrize("page", ["bf16", "fp8e4nv"])
def test_store_compiles_for_the_h200(compile_sm90, page):
    built = compile_sm90(
        _store_kernel,
        {
            **dict.fromkeys(("key", "value"), "*bf16:16"),
            "slots": "*i64:16",
            **dict.fromkeys(("key_pages", "value_pages"), f"*{page}:16"),
            **dict.fromkeys(("key_row", "key_in_head", "value_row", "value_in_head", *_STRIDES), "i32:16"),
            **dict.fromkeys(("key_scale", "value_scale"), "fp32"),
        },
        {
            "NUM_KV_HEADS": 4,
            "KEY_WIDTH": 192,
            "VALUE_WIDTH": 128,
            "BLOCK_KEY": 256,
            "BLOCK_VALUE": 128,
            "BLOCK_HEADS": 4,
            "FP8": page != "bf16",
            "PDL": True,
        },
        num_warps=4,
        launch_pdl=True,
    )
    assert built.spilled == 0


def test_table_compiles_for_the_h200(compile_sm90):
    built = compile_sm90(
        _table_kernel,
        {
            **dict.fromkeys(("position_ids", "axis"), "*i64:16"),
            **dict.fromkeys(("inv_freq", "cos", "sin"), "*fp32:16"),
            **dict.fromkeys(("axis_stride", "tokens", "half"), "i32"),
            "scaling": "fp32",
        },
        {"BLOCK_T": 4, "BLOCK_R": 64, "INTERPRETED": False, "PDL": True},
        num_warps=4,
        launch_pdl=True,
    )
    # the exact functions, not the hardware's approximation
    assert "cos.approx" not in built.ptx
