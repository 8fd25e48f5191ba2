"""HAT: tiles and files as published, sizes, scales, ranges, features, initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import load_published
from torch import Tensor, nn
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


@pytest.mark.slow  # tests/ops/test_tiling.py has quick ones of tiles
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


def published(model: nn.Module) -> dict[str, Tensor]:
    """The original's names for the tensors of a :func:`tiny` model, written out here."""
    tensors: dict[str, Tensor] = {"relative_position_index_SA": relative_position_index(4)}
    whole = {
        "stem.conv": "conv_first",
        "stem.norm": "patch_embed.norm",
        "norm": "norm",
        "body_conv": "conv_after_body",
        "head.conv_in": "conv_before_upsample.0",
        "head.upsample": "upsample",
        "head.conv_out": "conv_last",
        "stages.0.conv": "layers.0.conv",
        "stages.1.conv": "layers.1.conv",
        "stages.0.blocks.2": "layers.0.residual_group.overlap_attn",
        "stages.1.blocks.1": "layers.1.residual_group.overlap_attn",
    }
    inner = {
        ".conv.conv1.": ".conv_block.cab.0.",
        ".conv.conv2.": ".conv_block.cab.2.",
        ".conv.se.fc1.": ".conv_block.cab.3.attention.1.",
        ".conv.se.fc2.": ".conv_block.cab.3.attention.3.",
    }
    for key, tensor in model.state_dict().items():
        start = next((s for s in whole if key.startswith(f"{s}.")), None)
        if start is not None:
            name = whole[start] + key[len(start) :]
            if "overlap_attn" in name:
                name = name.replace(".attn.", ".")
        else:
            name = key.replace("stages.", "layers.").replace(".blocks.", ".residual_group.blocks.")
            for ours, theirs in inner.items():
                name = name.replace(ours, theirs)
        tensors[name] = tensor
    return tensors


@torch.no_grad()
def test_published_files(tmp_path):
    """They hold averaged weights beside the last ones, and the tables of positions."""
    model = tiny()
    tensors = published(model)
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


@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
@pytest.mark.parametrize("in_chans", [1, 3])
@torch.no_grad()
def test_scales(upscale, in_chans):
    model = tiny(upscale=upscale, in_chans=in_chans)
    x = images(2, in_chans, 9, 14)
    out = model(x)
    assert out.shape == (2, in_chans, 9 * upscale, 14 * upscale)
    torch.testing.assert_close(out[1:], model(x[1:]), rtol=1e-4, atol=1e-5)


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


def test_initial_weights():
    torch.manual_seed(0)
    model = backbones.create_model("hat_x2", depths=(2,), num_heads=(6,))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_in = module.weight[0].numel()  # PyTorch's uniform within ±fan_in^-0.5
            assert module.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1), name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5, name
    tables = {n: p for n, p in model.named_parameters() if n.endswith("bias_table")}
    assert {tuple(p.shape) for p in tables.values()} == {(31**2, 6), (39**2, 6)}
    for name, table in tables.items():
        assert table.std().item() == pytest.approx(0.02, rel=0.1), name
    assert model.no_weight_decay() == set(tables)


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


def test_there_is_no_classifier():
    model = tiny()
    assert model.num_classes == 0
    assert model.get_classifier() == ()
    with pytest.raises(ValueError, match="num_classes must be 0, got 10"):
        tiny(num_classes=10)
    with pytest.raises(ValueError, match="num_classes must be 0, got 10"):
        model.reset_classifier(10)
    with pytest.raises(NotImplementedError, match="call the model"):
        model.forward_head(images(1, 24, 4, 4))
    with pytest.raises(ValueError, match="upscale must be one of 1, 2, 3, 4, got 5"):
        tiny(upscale=5)


def test_published_stochastic_depth_is_that_of_hybrid_blocks():
    model = backbones.create_model("hat_s_x4", depths=(2, 2), num_heads=(6, 6))
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
