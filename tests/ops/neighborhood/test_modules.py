"""The layers around neighborhood attention."""

from __future__ import annotations

from typing import Any

import natten
import pytest
import torch
from torch import nn

from backbones.cli.parity import checkpoint, reference, summary_error, uniform
from ops.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na2d,
)

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
SIZE = (7, 6, 5)
PAD_CASES = reference("nat", "nat_mini")["pad_cases"]["cases"]


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
@pytest.mark.parametrize("small_maps", ["refuse", "shrink", "pad"])
def test_trains_all_parameters(rank: int, small_maps: str) -> None:
    kernel, size = (3, SIZE) if small_maps == "refuse" else (5, (2, 6, 3))
    options = {"stride": 2, "rel_pos_bias": True, "small_maps": small_maps}
    layer = LAYERS[rank](12, 3, kernel, **options)
    assert layer.rpb.shape == (3, *(2 * kernel - 1,) * rank)
    x = torch.randn(2, *size[:rank], 12, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert x.grad.isfinite().all() and x.grad.any()
    dropping = LAYERS[rank](12, 3, kernel, **options, proj_drop=1.0)
    assert not dropping(x).any() and dropping.eval()(x).any()


@pytest.mark.parametrize(
    ("layer", "size", "window"),
    [
        (
            {"kernel_size": (3, 5), "dilation": (2, 1), "qk_scale": 0.2, "rel_pos_bias": True},
            (7, 6),
            {"kernel_size": (3, 5), "dilation": (2, 1), "scale": 0.2},
        ),
        # Room for a dilation of 4 by 2, which shrinks before the window.
        (
            {"kernel_size": 3, "dilation": 4, "rel_pos_bias": True, "small_maps": "shrink"},
            (12, 7),
            {"kernel_size": 3, "dilation": (4, 2)},
        ),
        # The stride shrinks with the window.
        (
            {"kernel_size": 5, "stride": (3, 2), "small_maps": "shrink"},
            (2, 9),
            {"kernel_size": (2, 5), "stride": 2},
        ),
        # The window becomes the map, and takes the middle of the table.
        *(
            (
                {"kernel_size": 7, "dilation": 3, "rel_pos_bias": True, "small_maps": "shrink"},
                size,
                {"kernel_size": size},
            )
            for size in ((7, 7), (3, 5), (1, 6))
        ),
    ],
)
def test_equals_the_definition(
    layer: dict[str, Any], size: tuple[int, int], window: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    made = NeighborhoodAttention2D(12, 3, **layer).double()
    if made.rpb is not None:
        nn.init.normal_(made.rpb)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    query, key, value = made.qkv(x).view(2, *size, 3, 3, 4).unbind(3)
    rpb, kernel = made.rpb, window["kernel_size"]
    if rpb is not None:
        lengths = (2 * k - 1 for k in (kernel if isinstance(kernel, tuple) else (kernel,) * 2))
        for axis, length in enumerate(lengths, 1):
            rpb = rpb.narrow(axis, (rpb.shape[axis] - length) // 2, length)
    out = na2d(query, key, value, **window, rpb=rpb)
    torch.testing.assert_close(made(x), made.proj(out.flatten(3)))


# -- maps that the window does not fit -------------------------------------------------------------
@pytest.mark.parametrize("number", range(len(PAD_CASES)))
@torch.no_grad()
def test_pads_as_published(number: int) -> None:
    """Zeros before the first projection, keys like others, cut off before the last."""
    case = PAD_CASES[number]
    dim, heads, kernel = case["x"][3], case["num_heads"], case["kernel_size"]
    layer = NeighborhoodAttention2D(
        dim, heads, kernel, dilation=case["dilation"], rel_pos_bias=True, small_maps="pad"
    )
    rows = [(f"pad-{number}.{n}", list(p.shape), "float32") for n, p in layer.named_parameters()]
    weights = checkpoint({"synth_scale": [[r"\.rpb$", case["rpb_factor"]]]}, rows)
    layer.load_state_dict({n.split(".", 1)[1]: tensor for n, tensor in weights.items()})
    x = torch.from_numpy(uniform(f"pad-{number}-x", case["x"])).double()
    assert summary_error(layer.double()(x), case["out"]) < 1e-6
    single = layer.float()(x.float())
    assert summary_error(single, case["out"]) < 1e-5


@pytest.mark.parametrize("small_maps", ["shrink", "pad"])
def test_maps_that_fit_are_left_alone(small_maps: str) -> None:
    torch.manual_seed(0)
    options = {"dilation": (2, 1), "rel_pos_bias": True}
    plain = NeighborhoodAttention2D(8, 2, 3, **options)
    other = NeighborhoodAttention2D(8, 2, 3, **options, small_maps=small_maps)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(1, 7, 4, 8)  # the dilation does not divide the first side
    torch.testing.assert_close(other(x), plain(x), rtol=0, atol=0)
