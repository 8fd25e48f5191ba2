"""Large kernel attention: what it sees and what it gates."""

from __future__ import annotations

import torch

from ops.attention.large_kernel import LargeKernelAttention


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
