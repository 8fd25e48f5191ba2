"""Kolmogorov-Arnold layers against their formula and the published implementation's figures."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backbones.cli.parity import checkpoint, reference, relative_error, uniform
from ops.kan import KAN, KANLayer, reflectional_switch


@given(x=st.floats(-5, 5), point=st.floats(-2, 2), width=st.floats(0.1, 3))
def test_switch_is_its_formula(x: float, point: float, width: float) -> None:
    value = reflectional_switch(
        torch.tensor(x, dtype=torch.float64), torch.tensor([point], dtype=torch.float64), width
    )
    assert value.item() == pytest.approx(1 - math.tanh((x - point) / width) ** 2, abs=1e-12)
    assert 0 <= value.item() <= 1


def test_layer_is_its_formula_with_its_gradients() -> None:
    torch.manual_seed(0)
    layer = KANLayer(3, 4, num_grids=5, grid_range=(-1, 2), width=0.5).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    normed = layer.norm(x)
    weight = layer.linear.weight.view(4, 3, 5)
    expected = torch.zeros(2, 6, 4, dtype=torch.float64)
    for place, point in enumerate((-1, -0.25, 0.5, 1.25, 2)):
        bump = torch.cosh((normed - point) / 0.5) ** -2
        expected = expected + bump @ weight[:, :, place].T
    torch.testing.assert_close(layer(x), expected)
    tensors = [x, *(p for p in layer.parameters() if p.requires_grad)]
    scale = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((layer(x) * scale).sum(), tensors),
        torch.autograd.grad((expected * scale).sum(), tensors),
    )


def test_published_figures() -> None:
    case = reference("medvitv2", "medvitv2_tiny")["kan_case"]
    rows = [(f"kan.{name}", shape, dtype) for name, shape, dtype in case["state_dict"]]
    tensors = checkpoint({"state_dict": rows})
    kan = KAN((6, 10, 6))
    with torch.no_grad():
        for i, layer in enumerate(kan):
            layer.norm.weight.copy_(tensors[f"kan.layers.{i}.layernorm.weight"])
            layer.norm.bias.copy_(tensors[f"kan.layers.{i}.layernorm.bias"])
            layer.linear.weight.copy_(tensors[f"kan.layers.{i}.spline_linear.weight"])
        out = kan(torch.from_numpy(uniform("kan-x", (5, 6))))
    assert relative_error(out.flatten(), case["out"]) < 1e-5


def test_grid_is_constant() -> None:
    kan = KAN((4, 8, 2), num_grids=9)
    grids = [p for n, p in kan.named_parameters() if n.endswith("grid")]
    assert len(grids) == 2
    for grid in grids:
        assert not grid.requires_grad
        torch.testing.assert_close(grid, torch.arange(-2, 2.5, 0.5))
    assert kan(torch.zeros(3, 5, 4)).shape == (3, 5, 2)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"got 1, \(-2.0, 2.0\) and 0.33"):
        KANLayer(2, 2, num_grids=1)
    with pytest.raises(ValueError, match="ascending"):
        KANLayer(2, 2, grid_range=(1, 1))
    with pytest.raises(ValueError, match="and 0$"):
        KANLayer(2, 2, width=0)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        KAN((3,))
