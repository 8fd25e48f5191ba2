"""The necks: a pyramid of one map, and one that grows finer levels."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS

from backbones.openmmlab import SimpleFPN, TransposedFPN, VisionBackbone


def test_simple_fpn_makes_a_pyramid_of_the_last_map():
    torch.manual_seed(0)
    neck = MODELS.build(dict(type="SimpleFPN", in_channels=16, out_channels=8))
    neck.init_weights()
    maps = [torch.randn(2, 16, 6, 4) for _ in range(4)]
    outs = neck(maps)
    sides = [(24, 16), (12, 8), (6, 4), (3, 2), (2, 1)]
    assert [tuple(o.shape) for o in outs] == [(2, 8, *side) for side in sides]
    for level, out in zip(neck.pyramid(maps[-1]), outs[:4], strict=True):
        # Both norms make mean 0 and deviation 1 of a pixel's channels.
        torch.testing.assert_close(out.mean(1), torch.zeros_like(out[:, 0]), atol=1e-5, rtol=0)
        assert out.shape[2:] == level.shape[2:]
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])
    (sum(o.square().mean() for o in outs) + outs[3].sum()).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_necks_refuse():
    with pytest.raises(ValueError, match="write in_channels=8"):
        SimpleFPN(16)([torch.randn(1, 8, 4, 4)])
    with pytest.raises(ValueError, match="num_outs must be ≥ 4, got 3"):
        SimpleFPN(16, num_outs=3)
    with pytest.raises(ValueError, match="multiple of 4, got 18"):
        SimpleFPN(18)
    with pytest.raises(ValueError, match=r"write in_channels=\[8, 16, 24\]"):
        TransposedFPN([8, 16, 32], 4)([torch.randn(1, c, 4, 4) for c in (8, 16, 24)])
    with pytest.raises(ValueError, match="num_outs ≥ 5"):
        TransposedFPN([8, 16, 24], 4, num_outs=4, num_transposed=2)


@pytest.mark.parametrize("count", [1, 2])
def test_transposed_fpn_is_the_published_one(count):
    """The formula of the papers' detectors: sums over the backbone's maps, then transposed levels.

    These go on from the finest sum and receive nothing from above; then a 3×3 convolution a level,
    and what is coarser is every other pixel of the coarsest.
    """
    torch.manual_seed(0)
    neck = TransposedFPN([8, 16, 24], 4, num_outs=5, num_transposed=count)
    neck.init_weights()
    inputs = [torch.randn(2, c, s, s) for c, s in ((8, 12), (16, 6), (24, 3))]
    lateral = [layer(x) for layer, x in zip(neck.laterals, inputs, strict=True)]
    low = lateral[2]
    middle = lateral[1] + low.repeat_interleave(2, 2).repeat_interleave(2, 3)
    sums = [lateral[0] + middle.repeat_interleave(2, 2).repeat_interleave(2, 3), middle, low]
    for layer in neck.transposed:
        weight, bias = layer.weight, layer.bias
        # Stride 2 and kernel 2: each pixel becomes a patch of its own.
        patches = torch.einsum("bihw,iokl->bohkwl", sums[0], weight)
        b, o, h, _, w, _ = patches.shape
        sums.insert(0, patches.reshape(b, o, 2 * h, 2 * w) + bias[:, None, None])
    expected = [layer(x) for layer, x in zip(neck.outputs, sums, strict=True)]
    while len(expected) < 5:
        expected.append(expected[-1][:, :, ::2, ::2])
    for given, wanted in zip(neck(inputs), expected, strict=True):
        torch.testing.assert_close(given, wanted)
    sum(out.mean() for out in neck(inputs)).backward()
    assert all(p.grad is not None for p in neck.parameters())


@pytest.mark.parametrize("name", ["efficientvit_m4", "shvit_s4"])
@pytest.mark.parametrize(("count", "finest"), [(1, 8), (2, 4)])
def test_transposed_fpn_has_the_detectors_strides(name, count, finest):
    """Strides 8 … 128 for RetinaNet, 4 … 64 for Mask R-CNN, as their anchors expect."""
    with torch.device("meta"):
        backbone = VisionBackbone(name, depths=(1, 1, 1))
        neck = TransposedFPN(backbone.channels, num_transposed=count)
        sides = [m.shape[-1] for m in neck(backbone(torch.randn(1, 3, 256, 256)))]
    assert sides == [256 // (finest * 2**i) for i in range(5)]
