"""LITv2: detectors, deformable merging, small images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from zoo import images, randomise, small

import backbones
from backbones.cli.parity import tolerance
from backbones.litv2 import DeformableConv2d, DeformableMerging

TOLERANCE = tolerance("litv2")
SMALL: dict[str, Any] = {
    "dims": (32, 48, 64, 96),
    "num_heads": (0, 0, 4, 6),
    "depths": (1, 1, 1, 1),
}


def test_classifiers_need_their_norm():
    model = backbones.create_model("litv2_s", **SMALL)
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith(("norm.", "head."))}
    with pytest.raises(backbones.CheckpointError, match=r"4 tensors missing \(norm\.weight"):
        backbones.load_checkpoint(model, trunk)


@torch.no_grad()
def test_merging_starts_as_a_plain_convolution():
    merging = DeformableMerging(6, 8).eval()
    x = images(2, 6, 10, 7)
    conv = merging.conv
    plain = F.conv2d(x, conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(x), plain)
    torch.testing.assert_close(merging(x), F.gelu(merging.norm(plain)))


@torch.no_grad()
def test_taps_move_by_whole_pixels():
    """An offset of (+1 row, +2 columns) everywhere sees the map shifted, with zeros beyond it."""
    conv = DeformableConv2d(3, 4)
    assert conv.offset.bias is not None
    conv.offset.bias.copy_(torch.tensor([1.0, 2.0]).repeat(4))
    x = images(1, 3, 8, 8)
    shifted = F.pad(x[:, :, 1:, 2:], (0, 2, 0, 1))
    torch.testing.assert_close(conv(x), F.conv2d(shifted, conv.weight, conv.bias, stride=2))


@torch.no_grad()
def test_positions_are_exact_in_low_precision():
    conv = randomise(DeformableConv2d(8, 8))
    x = images(2, 8, 12, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv(x), conv(x.float()))
        assert conv(x).dtype == torch.float32
    exact = conv(x)
    conv.bfloat16()
    low = conv(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_too_small_images_are_rejected():
    model = backbones.create_model("litv2_s", **SMALL).eval()
    with pytest.raises(ValueError, match="1×16 cannot be halved.*29×29"):
        model(images(1, 3, 28, 256))


def test_nan_images_do_not_crash():
    """torchvision would read the pixels at positions that are NaN."""
    model = small("litv2").eval()
    with torch.no_grad():
        assert model(torch.full((1, 3, 64, 64), float("nan"))).isnan().all()
