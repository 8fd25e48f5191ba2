"""HAT: tiles and files as published, sizes, scales, ranges, features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import load_published
from torch import nn
from zoo import images

import backbones
from backbones.cli.parity import image, summary_error, tolerance
from ops.attention.window import relative_position_index
from ops.padding import reflect_pad_to_multiple
from ops.tiling import run_tiled

TOLERANCE = tolerance("hat")
TINY: dict[str, Any] = {
    "dim": 24,
    "depths": (2, 1),
    "num_heads": (2, 2),
    "window_size": 4,
    "compress_ratio": 3,
    "squeeze_factor": 8,
}


def tiny(name: str = "hat_s_x2", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return backbones.create_model(name, **{**TINY, **kwargs}).eval()


@pytest.mark.slow  # tests/ops/test_functions.py has quick ones of tiles
@torch.no_grad()
def test_tiles_as_published():
    """Tiles of 32 that read 16 around them; the image is padded from 40×56 to 48×64."""
    model, figures = load_published("hat", "hat_s_x2")
    case = figures["tile_case"]
    x = image(case["input"], case["seed"])
    tile = case["tile"]
    tiled = run_tiled(
        model, x, tile_size=tile["tile_size"], overlap=tile["tile_pad"], scale=model.upscale
    )
    assert summary_error(tiled, case["image"]) <= TOLERANCE
    whole = model(x)
    assert summary_error(whole, case["untiled_image"]) <= TOLERANCE
    # A tile sees no more than 16 pixels beyond its ends, so that they differ a little.
    assert 1e-4 < (tiled - whole).abs().max() < 0.5


@torch.no_grad()
def test_published_files(tmp_path):
    """They hold averaged weights beside the last ones, and the tables of positions."""
    model = tiny()
    tensors = {**model.state_dict(), "relative_position_index_SA": relative_position_index(4)}
    last = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    path = tmp_path / "HAT.pth"
    torch.save({"params": last, "params_ema": tensors}, path)
    loaded = backbones.create_model("hat_s_x2", checkpoint_path=str(path), **TINY).eval()
    x = images(1, 3, 12, 9)
    assert torch.equal(loaded(x), model(x))
    features = backbones.create_model(
        "hat_s_x2", checkpoint_path=str(path), features_only=True, out_indices=(0,), **TINY
    ).eval()
    assert torch.equal(features(x)[0], model.forward_intermediates(x)[1][0])


def test_downloads_fail_with_instructions():
    with pytest.raises(backbones.CheckpointError, match=r"HAT_SRx4_ImageNet-pretrain\.pth in http"):
        backbones.create_model("hat_x4", pretrained=True)


@pytest.mark.parametrize(("upscale", "in_chans"), [(1, 3), (3, 1), (4, 3)])
@torch.no_grad()
def test_scales(upscale, in_chans):
    model = tiny(upscale=upscale, in_chans=in_chans)
    model.reset_classifier(0, "avg")  # which removes nothing
    out = model(images(2, in_chans, 9, 14))
    assert out.shape == (2, in_chans, 9 * upscale, 14 * upscale)


@torch.no_grad()
def test_range_of_the_image():
    plain, wide = tiny(), tiny(img_range=255.0)
    x = images(1, 3, 8, 8)
    mean = torch.tensor((0.4488, 0.4371, 0.4040)).view(1, 3, 1, 1)
    assert torch.equal(plain.stem.mean, mean[0])
    expected = (plain((x - mean) * 255 + mean) - mean) / 255 + mean
    torch.testing.assert_close(wide(x), expected, rtol=1e-4, atol=1e-5)
    assert not tiny(in_chans=1).stem.mean.any()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 16), (13, 7), (8, 8)])
@torch.no_grad()
def test_sizes(size):
    model = tiny()
    x = images(1, 3, *size)
    missing = [-side % 4 for side in size]
    out = model(x)
    assert out.shape[2:] == (2 * size[0], 2 * size[1]) and out.isfinite().all()
    if missing[0] < size[0] and missing[1] < size[1]:
        padded = F.pad(x, (0, missing[1], 0, missing[0]), mode="reflect")
        assert torch.equal(out, model(padded)[:, :, : 2 * size[0], : 2 * size[1]])


@torch.no_grad()
def test_features_have_the_size_of_the_image():
    model = tiny()
    assert [info["reduction"] for info in model.feature_info] == [1, 1]
    x = images(1, 3, 10, 7)
    padded = F.pad(x, (0, 1, 0, 2), mode="reflect")
    last, maps = model.forward_intermediates(x)
    whole_last, whole = model.forward_intermediates(padded)
    for value, expected in zip((last, *maps), (whole_last, *whole), strict=True):
        assert torch.equal(value, expected[:, :, :10, :7])
    assert torch.equal(model.forward_features(x), last)
    nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert [tuple(m.shape) for m in nhwc] == [(1, 10, 7, 24)] * 2


@torch.no_grad()
def test_nano_starts_as_bicubic_and_learns_the_rest():
    model = backbones.create_model("hat_nano_x2").eval()
    assert model.residual and sum(p.numel() for p in model.parameters()) < 1_000_000
    x = torch.rand((1, 3, 20, 13), generator=torch.Generator().manual_seed(0))
    padded = reflect_pad_to_multiple(x, 8)
    bicubic = F.interpolate(padded, scale_factor=2, mode="bicubic")[:, :, :40, :26]
    assert torch.equal(model(x), bicubic)
    nn.init.normal_(model.head.conv_out.weight, std=0.1)
    assert (model(x) - bicubic).abs().max() > 1e-2
    # The published models have neither the shortcut nor a narrow head.
    published = backbones.create_model("hat_s_x2", depths=(1,), num_heads=(6,))
    assert not published.residual and published.head.conv_in.out_channels == 64
