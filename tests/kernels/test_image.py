"""Pixels to patches: kernels against the references, the references against transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.kernels.image import (
    normalise_patches,
    normalise_patches_reference,
    normalise_patchify,
    normalise_patchify_reference,
)
from triptych.kernels.image.kernel import _patches_kernel, _patchify_kernel
from triptych.kernels.image.launch import launch_patches, launch_patchify

_MEAN, _STD = torch.tensor([120.5, 116.25, 104.0]), torch.tensor([68.5, 66.75, 70.25])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "stored", "frames", "area"), [(1, 1, 2, 196), (5, 2, 2, 196), (3, 1, 1, 49), (2, 1, 2, 256)]
)
def test_patches_equal_the_reference(device, assert_close, dtype, count, stored, frames, area):
    torch.manual_seed(0)
    patches = torch.randint(0, 256, (count, 3, stored, area), dtype=torch.uint8, device=device)
    mean, std = _MEAN.to(device), _STD.to(device)
    got = launch_patches(patches, mean, std, frames, dtype)
    want = normalise_patches_reference(patches, mean, std, frames, dtype)
    if device == "cuda" or dtype != torch.bfloat16:
        assert torch.equal(got, want)
    else:
        # the interpreter cuts bfloat16 off where a GPU rounds
        assert_close(got, want)


@pytest.mark.parametrize(
    ("shape", "patch", "merge", "temporal"),
    [((28, 56, 3), 14, 2, 2), ((1, 16, 16, 3), 16, 1, 1), ((4, 32, 64, 3), 16, 2, 2), ((5, 28, 28, 3), 7, 2, 2)],
)
def test_patchify_equals_the_reference(device, shape, patch, merge, temporal):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    wide = pixels if pixels.dim() == 4 else pixels[None]
    mean, std = _MEAN.to(device), _STD.to(device)
    got = launch_patchify(wide, mean, std, patch, merge, temporal, torch.float32)
    assert torch.equal(got, normalise_patchify_reference(wide, mean, std, patch, merge, temporal, torch.float32))
    assert torch.equal(got, normalise_patchify(pixels, mean, std, patch, merge, temporal, torch.float32))


def test_is_what_the_image_processor_computes():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(patch_size=14, temporal_patch_size=2, merge_size=2)
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    expected = processor(Image.fromarray(pixels), do_resize=False, return_tensors="pt")["pixel_values"]
    mean = torch.tensor(processor.image_mean) * 255.0
    std = torch.tensor(processor.image_std) * 255.0
    got = normalise_patchify(torch.from_numpy(pixels), mean, std, 14, 2, 2, torch.float32)
    assert torch.equal(got, expected)


def test_is_what_the_video_processor_computes():
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor = Qwen2VLVideoProcessor(patch_size=14, temporal_patch_size=2, merge_size=2)
    frames = np.random.default_rng(0).integers(0, 256, (5, 56, 84, 3), dtype=np.uint8)
    expected = processor(
        [frames], do_resize=False, do_sample_frames=False, input_data_format="channels_last", return_tensors="pt"
    )["pixel_values_videos"]
    mean = torch.tensor(processor.image_mean) * 255.0
    std = torch.tensor(processor.image_std) * 255.0
    got = normalise_patchify(torch.from_numpy(frames), mean, std, 14, 2, 2, torch.float32)
    assert torch.equal(got, expected)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="28 x 28 squares"):
        normalise_patchify(torch.zeros(28, 30, 3, dtype=torch.uint8), _MEAN, _STD, 14, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="3 frames cannot fill 2"):
        normalise_patches(torch.zeros(1, 3, 3, 4, dtype=torch.uint8), _MEAN, _STD, 2, torch.float32)


def test_compiles_for_the_h200(compile_sm90):
    common = {"mean": "*fp32:16", "std": "*fp32:16", "out": "*bf16:16"}
    block = {"CHANNELS": 3, "BLOCK": 1024, "PDL": True}
    for stored in (1, 2):
        built = compile_sm90(
            _patches_kernel,
            {"patches": "*u8:16"} | common,
            block | {"STORED": stored, "FRAMES": 2, "AREA": 196},
            num_warps=4,
            launch_pdl=True,
        )
        assert built.spilled == 0
    built = compile_sm90(
        _patchify_kernel,
        {"pixels": "*u8:16"} | common | dict.fromkeys(("frames", "height", "width"), "i32"),
        block | {"PATCH": 14, "MERGE": 2, "TEMPORAL": 2},
        num_warps=4,
        launch_pdl=True,
    )
    assert built.spilled == 0
