"""The layers around neighborhood attention."""

from __future__ import annotations

import copy
import pickle

import natten
import pytest
import torch
from torch import nn

from ops.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na2d,
)

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
SIZE = (7, 6, 5)


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:return_lse is deprecated")
def test_equals_natten_and_loads_its_weights(rank: int) -> None:
    arguments = (32, 2, 3, 2, (2,) + (1,) * (rank - 1), (False,) * (rank - 1) + (True,))
    theirs = getattr(natten, f"NeighborhoodAttention{rank}D")(*arguments).requires_grad_(False)
    ours = LAYERS[rank](*arguments)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, *SIZE[:rank], 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("rank", LAYERS)
def test_trains_all_parameters(rank: int) -> None:
    layer = LAYERS[rank](12, 3, 3, rel_pos_bias=True)
    assert layer.rpb.shape == (3, *(5,) * rank)
    x = torch.randn(2, *SIZE[:rank], 12, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert x.grad.abs().sum() > 0


def test_is_what_it_says() -> None:
    layer = NeighborhoodAttention2D(
        12, 3, (3, 5), dilation=(2, 1), qk_scale=0.2, rel_pos_bias=True
    ).double()
    nn.init.normal_(layer.rpb)
    x = torch.randn(2, 7, 6, 12, dtype=torch.float64)
    query, key, value = (
        t.reshape(2, 7, 6, 3, 4)
        for t in nn.functional.linear(x, *layer.qkv.parameters()).chunk(3, -1)
    )
    out = na2d(query, key, value, (3, 5), dilation=(2, 1), scale=0.2, rpb=layer.rpb)
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(-2)))


def test_options() -> None:
    layer = NeighborhoodAttention1D(8, 2, 3, qkv_bias=False, proj_drop=0.5)
    assert layer.qkv.bias is None
    assert layer.rpb is None
    x = torch.randn(1, 6, 8)
    assert not layer(x).equal(layer(x))
    assert layer.eval()(x).equal(layer(x))
    assert NeighborhoodAttention1D(8, 2, 3, qk_scale=0.0).scale == 0
    assert "kernel_size=(3,)" in repr(layer)


def test_copies_and_pickles() -> None:
    layer = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 5, 6, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin(x).equal(layer(x))


def test_builds_and_runs_without_memory() -> None:
    with torch.device("meta"):
        layer = NeighborhoodAttention3D(8, 2, 3, rel_pos_bias=True)
        assert layer(torch.empty(2, 4, 5, 6, 8)).shape == (2, 4, 5, 6, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).to(dtype)
    x = torch.randn(1, 5, 6, 8, dtype=dtype, requires_grad=True)
    out = layer(x)
    assert out.dtype == dtype
    out.sum().backward()


def test_compiles() -> None:
    torch._dynamo.reset()
    layer = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 5, 6, 8)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 3, 3), "3 heads for 10 channels"),
        ((10, 0, 3), "0 heads"),
        ((8, 2, 0), "kernel_size .* got 0"),
        ((8, 2, (3, 3, 3)), "kernel_size .* 2 axes"),
        ((8, 2, 3, 4), r"stride .* \(4, 4\) > \(3, 3\)"),
        ((8, 2, 3, 1, 0), "dilation .* got 0"),
        ((8, 2, 3, 1, 1, "yes"), "is_causal .* 'yes'"),
    ],
)
def test_refuses_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2D(*arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 5, 8), "2 axes and 8 channels"), ((1, 5, 6, 7), "8 channels"), ((1, 2, 6, 8), "3 > 2")],
)
def test_refuses_inputs(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2D(8, 2, 3)(torch.randn(shape))
