"""Kolmogorov-Arnold layers in one pass against the plain ones in float64."""

from __future__ import annotations

import torch
from compiled_kernels import LINEAR_DTYPES, random
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.cpu.feed_forward.kan import kan_layer
from ops.inference.kan import FastKANLayer, pack_kan
from ops.inference.layers import convert
from ops.kan import KANLayer


def _layer(
    in_features: int, out_features: int, grids: int, dtype: torch.dtype = torch.float32
) -> tuple[KANLayer, KANLayer]:
    """In ``dtype``, and the same in float64."""
    torch.manual_seed(0)
    layer = KANLayer(in_features, out_features, grids, width=0.4)
    torch.nn.init.normal_(layer.norm.weight, 1, 0.3)
    torch.nn.init.normal_(layer.norm.bias, 0, 0.3)
    exact = KANLayer(in_features, out_features, grids, width=0.4).double()
    layer = layer.to(dtype).requires_grad_(False)
    exact.load_state_dict(layer.state_dict())
    return layer, exact.requires_grad_(False)


@settings(max_examples=60)
@given(
    shape=st.sampled_from([(1, 1), (7,), (2, 3, 5), (1, 300), (2, 0)]),
    in_features=st.sampled_from([1, 5, 16, 33, 64]),
    out_features=st.sampled_from([1, 16, 40]),
    grids=st.integers(2, 9),
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
)
def test_is_the_plain_layer(shape, in_features, out_features, grids, dtype) -> None:
    layer, exact = _layer(in_features, out_features, grids, dtype)
    x = (3 * random(*shape, in_features) + 1).to(dtype)
    out = kan_layer(x, *pack_kan(layer))
    assert out.dtype == dtype and out.shape == (*shape, out_features)
    if not out.numel():
        return
    # Bumps reach 1; bfloat16 keeps 8 bits of them.
    bound = exact.linear.weight.abs().sum(1).max()
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    assert (out - exact(x.double())).abs().max() <= tolerance * (1 + bound)


def test_zero_far_from_the_grid_and_nan_propagates() -> None:
    layer, exact = _layer(4, 3, 8)
    x = torch.tensor([[1e15, -1e15, 0, 0], [300, -300, 1, 0], [float("nan"), 0, 1, 2]])
    torch.nn.init.constant_(layer.norm.weight, 50)
    exact.load_state_dict(layer.state_dict())
    out = kan_layer(x, *pack_kan(layer))
    assert out[2].isnan().all()
    torch.testing.assert_close(out[:2].double(), exact(x[:2].double()), rtol=1e-5, atol=1e-5)


def test_fine_grids_fall_back_to_the_plain_layer() -> None:
    torch.manual_seed(0)
    layer, x = KANLayer(12, 7, width=0.01).requires_grad_(False), torch.randn(2, 5, 12)
    expected, layer = layer(x), convert(layer, FastKANLayer)
    assert pack_kan(layer) is None
    torch.testing.assert_close(layer(x), expected)
