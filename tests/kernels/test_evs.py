"""Efficient video sampling: similarity of frames, and which tokens stay."""

from __future__ import annotations

import pytest
import torch

from triptych.kernels.evs import frame_similarity, frame_similarity_reference, keep_mask, num_kept
from triptych.kernels.evs.kernel import _similarity_kernel
from triptych.kernels.evs.launch import launch_similarity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 2, 5, 80), (2, 1, 3, 1025), (1, 4, 4, 8)])
def test_similarity_equals_the_reference(device, assert_close, dtype, shape):
    torch.manual_seed(0)
    features = torch.randn(shape, device=device).to(dtype)
    features[1:] += features[:-1].clone()
    assert_close(launch_similarity(features), frame_similarity_reference(features))


def test_similarity_by_hand(device):
    frames = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, -1.0], [0.0, 0.0]], device=device)
    for run in (launch_similarity, frame_similarity):
        assert run(frames[:, None, None]).flatten().tolist() == pytest.approx([1, 0, -1, 0])


def test_the_least_similar_stay(device):
    similarity = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.99], [0.5, -0.3]]], device=device)
    mask = keep_mask(similarity, 0.4)
    # int(12 * 0.6) = 7: the first frame, then -0.3, 0.1, 0.2
    assert mask.int().tolist() == [[[1, 1], [1, 1]], [[0, 1], [0, 0]], [[1, 0], [0, 1]]]
    # one more: of three that are equally similar the first
    assert keep_mask(similarity, 0.3).int()[1].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_the_number_that_stays_is_known_before(device, rate, frames):
    torch.manual_seed(0)
    mask = keep_mask(torch.rand(frames - 1, 3, 4, device=device), rate)
    assert mask.shape == (frames, 3, 4)
    assert mask.sum().item() == num_kept(frames, 12, rate) == max(12, int(12 * frames * (1 - rate)))
    assert mask[0].all()


def test_refuses_a_rate_out_of_range():
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="pruning rate"):
            num_kept(2, 4, rate)


def test_compiles_for_the_h200(compile_sm90):
    built = compile_sm90(
        _similarity_kernel,
        {"features": "*bf16:16", "out": "*fp32:16", "places": "i32:16", "width": "i32:16"},
        {"BLOCK": 1024, "PDL": True},
        num_warps=4,
        launch_pdl=True,
    )
    assert built.spilled == 0
    assert "ld.global.v4" in built.ptx
