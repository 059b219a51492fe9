"""Linear layers of few rows: both kernels against the reference, what they round, what they compile to."""

from __future__ import annotations

import pytest
import torch

from triptych.kernels.linear import fits, linear, linear_reference
from triptych.kernels.linear.kernel import _dot_kernel, _fma_kernel, _reduce_kernel
from triptych.kernels.linear.launch import _nearest, launch
from triptych.kernels.linear.table import TABLE, Dot, Fma

# rows of x, output features, columns, entry: tiles that do not divide, one row too many, groups, steps, splits
FMA = [
    (1, 9, 8, Fma(1, 16, 1)),
    (1, 24, 64, Fma(2, 64, 4)),
    (1, 37, 72, Fma(4, 32, 4, 3)),
    (2, 19, 40, Fma(2, 64, 4, 2, 64)),
    (3, 21, 56, Fma(1, 16, 1, 1, 32)),
    (3, 18, 13, Fma(4, 16, 1, 2)),
    (4, 30, 24, Fma(8, 16, 1)),
]
DOT = [
    (5, 24, 64, Dot(16, 32, 4, 3)),
    (16, 70, 80, Dot(64, 32, 4, 4)),
    (17, 37, 104, Dot(16, 16, 4, 2, 3)),
    (33, 33, 72, Dot(32, 32, 4, 2, 2, 64)),
    (64, 16, 48, Dot(16, 32, 4, 3, 2)),
    (129, 17, 33, Dot(16, 16, 4, 2, 2)),
]


def _inputs(device, dtype, rows, features, width, *, gate=None, bias=False, residual=False, norm=None):
    torch.manual_seed(rows * 1000 + features)

    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype)

    # rows of wider arrays
    x = draw(rows, width + 8)[:, :width]
    weight = (draw(features * (2 if gate else 1), width) / width**0.5).contiguous()
    extra = {
        "gate": gate,
        "bias": draw(weight.shape[0]) if bias else None,
        "residual": draw(rows, features + 8)[:, :features] if residual else None,
        "norm": None if norm is None else (draw(width), 1e-5, norm),
    }
    return x, weight, extra


@pytest.mark.parametrize(("rows", "features", "width", "entry"), FMA + DOT)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"bias": True, "norm": 0.0},
        {"residual": True},
        {"gate": "silu", "norm": 0.0},
        {"gate": "gelu_tanh", "norm": 1.0, "bias": True, "residual": True},
    ],
    ids=["plain", "norm_bias", "residual", "norm_silu", "all"],
)
def test_equals_the_reference(device, assert_close, rows, features, width, entry, extra):
    # with everything inside also what is rounded on the way
    for dtype in (torch.float32, torch.float16) if len(extra) == 4 else (torch.float32,):
        x, weight, given = _inputs(device, dtype, rows, features, width, **extra)
        assert_close(launch(x, weight, entry, **given), linear_reference(x, weight, **given))


@pytest.mark.parametrize(("rows", "features", "width", "entry"), FMA + DOT)
def test_in_bfloat16(device, assert_close, rows, features, width, entry):
    x, weight, extra = _inputs(device, torch.bfloat16, rows, features, width)
    assert_close(launch(x, weight, entry, **extra), linear_reference(x, weight, **extra))


@pytest.mark.parametrize("gate", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("entry", [Fma(2, 32, 1), Dot(16, 16, 4, 2), Dot(16, 16, 4, 2, 2)])
def test_every_activation(device, assert_close, gate, entry):
    x, weight, extra = _inputs(device, torch.float32, 3, 20, 48, gate=gate)
    assert_close(launch(x, weight, entry, **extra), linear_reference(x, weight, **extra))


@pytest.mark.parametrize("entry", [Fma(2, 32, 1, 2), Dot(16, 16, 4, 2), Dot(16, 32, 4, 2, 3)])
def test_a_row_does_not_depend_on_its_neighbours(device, entry):
    x, weight, extra = _inputs(device, torch.bfloat16, 4, 40, 96, norm=0.0, residual=True)
    first = launch(x, weight, entry, **extra)
    others = x.clone()
    others[1:] = torch.randn(3, 96, device=device) * 100
    second = launch(others, weight, entry, **extra)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1:], second[1:])


@pytest.mark.parametrize("entry", [Fma(2, 64, 1), Dot(16, 32, 4, 2, 2)])
def test_rounds_where_separate_ops_round(device, entry):
    """With sums that are exact in any order, every later step must give the bits of the separate ops."""
    torch.manual_seed(0)
    # the interpreter cuts bfloat16 off instead of rounding it
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    x = torch.randint(-4, 5, (4, 64), device=device).to(dtype)
    weight = torch.randint(-4, 5, (256, 64), device=device).to(dtype) / 16
    residual = torch.randn(4, 128, device=device).to(dtype)
    out = launch(x, weight, entry, gate="silu", residual=residual)
    expected = linear_reference(x, weight, gate="silu", residual=residual)
    # the activation itself may differ in its last bit before it is rounded
    assert (out != expected).float().mean() < 5e-3
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
    late = (residual.float() + torch.nn.functional.silu(gate) * up).to(dtype)
    assert (late != expected).float().mean() > 0.05


def test_nan_stays_in_its_row(device):
    x, weight, extra = _inputs(device, torch.float32, 4, 24, 40, norm=0.0)
    x[2, 5] = float("nan")
    for entry in (Fma(2, 16, 1), Dot(16, 16, 4, 2, 2)):
        bad = torch.isnan(launch(x, weight, entry, **extra)).any(1)
        assert bad.tolist() == [False, False, True, False]


def test_on_a_cpu_it_is_torch(assert_close):
    x, weight, extra = _inputs("cpu", torch.float32, 3, 20, 48, gate="silu", norm=0.0, residual=True)
    assert torch.equal(linear(x, weight, **extra), linear_reference(x, weight, **extra))
    assert not fits(1, 3584, 3584, torch.bfloat16, torch.device("cpu"))


def test_refuses_what_it_cannot_do(device):
    x, weight, _ = _inputs(device, torch.float32, 5, 20, 48)
    with pytest.raises(ValueError, match="at most 4"):
        launch(x, weight, Fma(1, 16, 1))
    with pytest.raises(ValueError, match="do not fit"):
        launch(x[:, :40], weight, Dot(16, 16, 4, 2))
    with pytest.raises(ValueError, match="do not fit bias"):
        launch(x, weight, Dot(16, 16, 4, 2), bias=torch.zeros(21, device=device))
    with pytest.raises(ValueError, match="result's shape"):
        launch(x, weight, Dot(16, 16, 4, 2), residual=torch.zeros(5, 21, device=device))
    with pytest.raises(ValueError, match="not one of"):
        launch(x, weight, Dot(16, 16, 4, 2), gate="relu")
    with pytest.raises(ValueError, match="equally wide"):
        launch(x, weight[:19], Dot(16, 16, 4, 2), gate="silu")
    with pytest.raises(ValueError, match="next to each other"):
        launch(x, weight.T.contiguous().T, Dot(16, 16, 4, 2))


def test_the_nearest_shape_is_taken():
    assert _nearest(1, 3584, 3584, 9) == TABLE[3584, 3584][0][1]
    # half of gate and up, as on two GPUs
    assert _nearest(1, 18944, 3584, 9) == TABLE[37888, 3584][0][1]
    assert _nearest(1, 3584, 9472, 9) == TABLE[3584, 18944][0][1]
    # no tile reaches past a narrow weight
    narrow = _nearest(1, 2048, 2048, 9)
    assert isinstance(narrow, Fma)
    assert narrow.block_k <= 2048
    assert _nearest(100_000, 3584, 3584, 9) is None
    assert _nearest(1, 3584, 3585, 9) is None
    # tiny layers are no business of these kernels; other GPUs get the way without tensor cores only
    assert _nearest(1, 64, 64, 9) is None
    assert isinstance(_nearest(1, 3584, 3584, 8), Fma)
    assert _nearest(32, 3584, 3584, 8) is None


def test_the_table_ascends():
    for entries in TABLE.values():
        most = [rows for rows, _ in entries]
        assert most == sorted(set(most))
        assert all(rows <= 4 for rows, entry in entries if isinstance(entry, Fma))


def _entries(kind, rows):
    """(shape, entry) of the table for ``rows`` rows."""
    found = ((shape, next((e for most, e in entries if rows <= most), None)) for shape, entries in TABLE.items())
    return [(shape, entry) for shape, entry in found if isinstance(entry, kind)]


def _gate(features):
    return "silu" if features == 37888 else ""


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_fma_compiles_for_the_h200(compile_sm90, rows):
    for (features, width), entry in _entries(Fma, rows):
        norm, bias, residual = features in (4608, 37888), features == 4608, features == 3584
        present = {"bias": bias, "residual": residual, "norm": norm}
        built = compile_sm90(
            _fma_kernel,
            {
                **dict.fromkeys(("x", "weight", "out", *(name for name, here in present.items() if here)), "*bf16:16"),
                **dict.fromkeys(("x_row", "weight_row", "residual_row", "count_n"), "i32:16"),
                **dict.fromkeys(("count_m", "groups", "prefetch"), "i32"),
                **dict.fromkeys(("eps", "offset"), "fp32"),
            },
            {
                **{name: None for name, here in present.items() if not here},
                "K": width,
                "M": rows,
                "BLOCK_N": entry.block_n,
                "BLOCK_K": entry.block_k,
                "GATE": _gate(features),
                "BIAS": bias,
                "NORM": norm,
                "GEMMA": False,
                "PDL": True,
            },
            num_warps=entry.warps,
            launch_pdl=True,
        )
        name = f"{features}x{width}"
        assert built.spilled == 0, name
        assert built.registers <= 168, name
        # the first weights are on their way before the kernel waits for the one before it
        before = built.ptx.split("griddepcontrol.wait")[0]
        tile = entry.block_n * entry.block_k // (entry.warps * 32 * 8) * (2 if _gate(features) else 1)
        # and, where one step does it, the norm's weight
        scale = entry.block_k // (entry.warps * 32 * 8) if norm and entry.block_k >= width else 0
        assert len(_vector_loads(before)) == tile + scale, name
        assert "cp.async.bulk.prefetch.L2" in before, name
        assert before.index("griddepcontrol.launch_dependents") < before.index("ld.global"), name
        # neither x nor the weight changes threads: what shared memory there is serves the sums over warps
        assert built.shared <= 4 * 2 * rows * entry.block_n * entry.warps, name


def _vector_loads(ptx):
    return [line for line in ptx.splitlines() if "ld.global" in line and ".v4.b32" in line]


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_dot_compiles_for_the_h200(compile_sm90, rows):
    for (features, width), entry in _entries(Dot, rows):
        present = {"partial": entry.splits > 1, "residual": features == 3584, "bias": False}
        built = compile_sm90(
            _dot_kernel,
            {
                **dict.fromkeys(("x", "weight", "out"), "*bf16:16"),
                **({"partial": "*fp32:16"} if present["partial"] else {}),
                **({"residual": "*bf16:16"} if present["residual"] else {}),
                **dict.fromkeys(("x_row", "weight_row", "residual_row", "count_n", "span"), "i32:16"),
                **dict.fromkeys(("count_m", "prefetch"), "i32"),
            },
            {
                **{name: None for name, here in present.items() if not here},
                "K": width,
                "BLOCK_M": rows,
                "BLOCK_N": entry.block_n,
                "BLOCK_K": entry.block_k,
                "GATE": _gate(features),
                "BIAS": False,
                "UPCAST": False,
                "PDL": True,
            },
            num_warps=entry.warps,
            num_stages=entry.stages,
            launch_pdl=True,
        )
        name = f"{features}x{width}"
        assert built.spilled == 0, name
        assert built.shared <= 227 * 1024, name
        assert ("wgmma" if entry.block_n >= 64 else "mma.sync") in built.ptx, name
        assert "cp.async" in built.ptx, name


@pytest.mark.parametrize("gate", ["", "silu"])
def test_reduce_compiles_for_the_h200(compile_sm90, gate):
    built = compile_sm90(
        _reduce_kernel,
        {
            "partial": "*fp32:16",
            **dict.fromkeys(("residual", "out"), "*bf16:16"),
            **dict.fromkeys(("residual_row", "count_n"), "i32:16"),
            **dict.fromkeys(("count_m", "splits"), "i32"),
        },
        {"bias": None, "BLOCK": 256, "GATE": gate, "BIAS": False, "PDL": True},
        num_warps=2,
        launch_pdl=True,
    )
    assert built.spilled == 0
    assert "griddepcontrol.wait" in built.ptx
