"""Maps scanned in four orders, row by row and column by column, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from scan_inputs import gradients_of, map_inputs

from ops.selective_scan import cross_merge, cross_scan, cross_selective_scan, selective_scan

EXACT = {"chunked": torch.float64, "cpu": torch.float32}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
STEPS = {"delta_softplus": True}
SIDES = [(1, 1), (3, 5), (7, 7), (1, 40), (40, 1), (16, 9)]


def test_the_four_orders():
    """Row by row, column by column, and both in reverse."""
    x = torch.arange(6).view(1, 2, 3, 1)
    assert cross_scan(x)[0, :, 0].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    assert torch.equal(cross_merge(cross_scan(x), 2, 3), 4 * x)


@pytest.mark.parametrize(("height", "width"), SIDES)
def test_merge_is_the_adjoint_of_scan(height, width):
    x = torch.randn(2, height, width, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 3, height * width, dtype=torch.float64, requires_grad=True)
    merged, scanned = cross_merge(y, height, width), cross_scan(x)
    torch.testing.assert_close((scanned * y).sum(), (x * merged).sum())
    (of_x,) = torch.autograd.grad((scanned * y.detach()).sum(), x)
    torch.testing.assert_close(of_x, merged)
    (of_y,) = torch.autograd.grad((merged * x.detach()).sum(), y)
    torch.testing.assert_close(of_y, scanned)


def test_merge_rejects_other_sizes():
    with pytest.raises(ValueError, match=r"y must be \(B, 4, C, 2 · 3 = 6\), got \(1, 4, 5, 7\)"):
        cross_merge(torch.zeros(1, 4, 5, 7), 2, 3)
    with pytest.raises(ValueError, match=r"got \(1, 2, 5, 6\)"):
        cross_merge(torch.zeros(1, 2, 5, 6), 2, 3)


def composed(x, projected, delta_weight, A, D=None, delta_bias=None):
    """The four sequences one by one, and the map of their sums, by the reference."""
    height, width, channels = x.shape[1:]
    rank, states = delta_weight.shape[2], A.shape[1]
    outs = []
    for k, of_pixel in enumerate(projected.unflatten(-1, (4, -1)).unbind(-2)):
        rows = slice(k * channels, (k + 1) * channels)
        steps, before, after = cross_scan(of_pixel)[:, k].split([rank, states, states], 1)
        out = selective_scan(
            cross_scan(x)[:, k],
            delta_weight[k] @ steps,
            A[rows],
            before[:, None],
            after[:, None],
            None if D is None else D[rows],
            delta_bias=None if delta_bias is None else delta_bias[rows],
            **STEPS,
            backend="reference",
        )
        outs.append(out)
    return cross_merge(torch.stack(outs, 1), height, width)


@pytest.mark.parametrize("backend", ["reference", *EXACT])
@pytest.mark.parametrize(("height", "width"), SIDES)
@pytest.mark.parametrize("states", [1, 16])
def test_a_map_in_four_orders(backend, height, width, states):
    given = map_inputs(height, width, states=states)
    expected = gradients_of(composed, given, torch.float64)
    dtype = EXACT.get(backend, torch.float64)
    found = gradients_of(cross_selective_scan, given, dtype, **STEPS, backend=backend)
    for name, exact in expected.items():
        scale = exact.abs().max().clamp(min=1e-2)
        assert (found[name].double() - exact).abs().max() / scale < 2 * TOLERANCE[dtype], name
