"""Dilated branches merge into the large kernel exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import randomise

from ops.large_kernel import DilatedReparamConv2d, merge_dilated_kernels


def naive_depthwise(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """A sum over the taps, each a shifted map."""
    reach = dilation * (weight.shape[-1] // 2)
    height, width = x.shape[2:]
    padded = F.pad(x, (reach,) * 4)
    out = torch.zeros_like(x)
    for i in range(weight.shape[-1]):
        for j in range(weight.shape[-1]):
            top, left = i * dilation, j * dilation
            shifted = padded[:, :, top : top + height, left : left + width]
            out += shifted * weight[:, 0, i, j].view(-1, 1, 1)
    return out


@given(
    branches=st.lists(
        st.tuples(st.sampled_from([1, 3, 5]), st.integers(1, 3)), min_size=1, max_size=4
    ),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_merged_kernel_is_the_sum(branches: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(2, 3, 7, 9, **options)
    weights = [torch.randn(3, 1, size, size, **options) for size, _ in branches]
    dilations = [dilation for _, dilation in branches]
    merged = merge_dilated_kernels(weights, dilations, 13)
    expected = sum(naive_depthwise(x, w, d) for w, d in zip(weights, dilations, strict=True))
    torch.testing.assert_close(F.conv2d(x, merged, padding=6, groups=3), expected)


def test_gradients_reach_every_kernel() -> None:
    weights = [torch.randn(2, 1, k, k, dtype=torch.float64, requires_grad=True) for k in (5, 3, 3)]
    assert torch.autograd.gradcheck(lambda *w: merge_dilated_kernels(w, (1, 1, 2), 5), weights)


@pytest.mark.parametrize("kernel_size", [5, 7, 9, 11, 13, 15, 17])
@torch.no_grad()
def test_fused_layer_keeps_the_output(kernel_size: int) -> None:
    torch.manual_seed(0)
    layer = randomise(DilatedReparamConv2d(4, kernel_size)).double().eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(2, 4, 8, 11, dtype=torch.float64)
    expected = layer.large(x)
    for branch in layer.branches.values():
        mixed = naive_depthwise(x, branch.conv.weight, branch.conv.dilation[0])
        expected += branch.norm(mixed)
    torch.testing.assert_close(layer(x), expected)
    fused = layer.fuse()
    assert isinstance(fused, torch.nn.Conv2d) and fused.kernel_size == (kernel_size,) * 2
    torch.testing.assert_close(fused(x), expected)
    # Fusing leaves the layer as it was, so that it may be walked again.
    torch.testing.assert_close(layer.state_dict(), before)


@pytest.mark.parametrize(
    ("kernel_size", "branches", "message"),
    [
        (12, None, "no branches are published"),
        (3, None, "no branches are published"),
        (7, [(5, 2)], "span 9 at most 7"),
        (7, [(4, 1)], "odd"),
        (8, [(3, 1)], "odd"),
        (7, [(3, 0)], "dilation 0"),
    ],
)
def test_rejects_bad_arguments(
    kernel_size: int, branches: list[tuple[int, int]] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DilatedReparamConv2d(4, kernel_size, branches)
