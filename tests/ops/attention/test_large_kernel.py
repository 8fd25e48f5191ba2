"""Large kernel attention: its receptive field and its gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.attention.large_kernel import DilatedDepthwiseConv2d, LargeKernelAttention


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 31), st.integers(1, 31)),
    kernel_size=st.sampled_from([3, 5, 7]),
    dilation=st.integers(1, 4),
)
def test_phases_make_the_same_map_and_gradients(size, kernel_size, dilation) -> None:
    layer = DilatedDepthwiseConv2d(3, kernel_size, dilation).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    wanted = F.conv2d(x, layer.weight, layer.bias, 1, layer.padding, dilation, groups=3)
    out, into = layer(x), torch.randn_like(wanted)
    torch.testing.assert_close(out, wanted)
    wrt = (x, layer.weight, layer.bias)
    grads = torch.autograd.grad(out, wrt, into)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, wrt, into))


@torch.no_grad()
def test_reach_is_23_pixels() -> None:
    layer = LargeKernelAttention(2)
    base = torch.ones(1, 2, 41, 41)
    moved = base.clone()
    moved[:, :, 20, 20] += 1
    changed = (layer(moved) != layer(base)).any(1)[0].nonzero()
    assert changed.min(0).values.tolist() == [9, 9]
    assert changed.max(0).values.tolist() == [31, 31]


@torch.no_grad()
def test_it_gates_its_input() -> None:
    layer = LargeKernelAttention(3).double()
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x) / x, layer.pw(layer.dw_dilated(layer.dw(x))))
    layer.pw.weight.zero_()
    layer.pw.bias.fill_(1)
    assert torch.equal(layer(x), x)
