"""The layers around neighborhood attention."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import natten
import pytest
import torch
from torch import Tensor, nn

from backbones.cli.parity import checkpoint, reference, summary_error, uniform
from ops.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na2d,
)

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
SIZE = (7, 6, 5)
_LAYER = NeighborhoodAttention2D(8, 2, 3)
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


def test_equals_the_definition() -> None:
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


def test_copies_and_pickles() -> None:
    layer = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 5, 6, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin(x).equal(layer(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NeighborhoodAttention2D(10, 3, 3), "3 heads for 10 channels"),
        (lambda: NeighborhoodAttention2D(10, 0, 3), "0 heads"),
        (lambda: NeighborhoodAttention2D(8, 2, 0), "kernel_size .* got 0"),
        (lambda: NeighborhoodAttention2D(8, 2, (3, 3, 3)), "kernel_size .* 2 axes"),
        (lambda: NeighborhoodAttention2D(8, 2, 3, 4), r"stride .* \(4, 4\) > \(3, 3\)"),
        (lambda: NeighborhoodAttention2D(8, 2, 3, 1, 0), "dilation .* got 0"),
        (lambda: NeighborhoodAttention2D(8, 2, 3, 1, 1, "yes"), "is_causal .* 'yes'"),
        (
            lambda: NeighborhoodAttention2D(8, 2, 3, small_maps="crop"),
            "small_maps must be one of refuse, .*, got 'crop'",
        ),
        (lambda: _LAYER(torch.zeros(1, 5, 8)), "2 axes and 8 channels"),
        (lambda: _LAYER(torch.zeros(1, 5, 6, 7)), "8 channels"),
        (lambda: _LAYER(torch.zeros(1, 2, 6, 8)), "3 > 2"),
    ],
)
def test_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- maps that the window does not fit -------------------------------------------------------------
def shrinking(kernel_size: int, dilation: int) -> NeighborhoodAttention2D:
    torch.manual_seed(0)
    layer = NeighborhoodAttention2D(
        8, 2, kernel_size, dilation=dilation, rel_pos_bias=True, small_maps="shrink"
    ).double()
    nn.init.normal_(layer.rpb)
    return layer


def naive_window(layer: NeighborhoodAttention2D, x: Tensor, table: Tensor) -> Tensor:
    """Attention to the whole map, with the bias of each offset looked up in the whole table."""
    _, height, width, dim = x.shape
    query, key, value = layer.qkv(x).view(-1, 3, layer.num_heads, dim // layer.num_heads).unbind(1)
    centre = table.shape[1] // 2
    places = [(i, j) for i in range(height) for j in range(width)]
    rows = []
    for n, (i, j) in enumerate(places):
        heads = []
        for h in range(layer.num_heads):
            bias = torch.stack([table[h, centre + y - i, centre + z - j] for y, z in places])
            logits = key[:, h] @ query[n, h] * layer.scale + bias
            heads.append(logits.softmax(0) @ value[:, h])
        rows.append(torch.cat(heads))
    return layer.proj(torch.stack(rows)).view(x.shape)


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (2, 2), (1, 6), (4, 7)])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_window_of_a_small_map_is_the_map(size: tuple[int, int], dilation: int) -> None:
    layer = shrinking(7, dilation)
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive_window(layer, x, layer.rpb))


def test_dilation_shrinks_before_the_window() -> None:
    layer = shrinking(3, 4)
    x = torch.randn(1, 12, 7, 8, dtype=torch.float64)  # room for a dilation of 4 by 2
    query, key, value = layer.qkv(x).view(1, 12, 7, 3, 2, 4).unbind(3)
    out = na2d(query, key, value, 3, dilation=(4, 2), rpb=layer.rpb)
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(3)))


def test_stride_shrinks_with_the_window() -> None:
    torch.manual_seed(0)
    layer = NeighborhoodAttention2D(8, 2, 5, stride=(3, 2), small_maps="shrink").double()
    x = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    query, key, value = layer.qkv(x).view(1, 2, 9, 3, 2, 4).unbind(3)
    out = na2d(query, key, value, (2, 5), stride=2)
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(3)))


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


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_padding_is_zeros_before_the_first_projection(qkv_bias: bool) -> None:
    layer = NeighborhoodAttention2D(8, 2, 3, dilation=(1, 2), qkv_bias=qkv_bias, small_maps="pad")
    x = torch.randn(1, 2, 5, 8)
    padded = nn.functional.pad(x, (0, 0, 0, 1, 0, 1))
    torch.testing.assert_close(layer(x), layer(padded)[:, :2, :5])


@pytest.mark.parametrize("small_maps", ["shrink", "pad"])
def test_maps_that_fit_are_left_alone(small_maps: str) -> None:
    torch.manual_seed(0)
    plain = NeighborhoodAttention2D(8, 2, 3, dilation=(2, 1), rel_pos_bias=True)
    other = NeighborhoodAttention2D(
        8, 2, 3, dilation=(2, 1), rel_pos_bias=True, small_maps=small_maps
    )
    other.load_state_dict(plain.state_dict())
    x = torch.randn(1, 7, 4, 8)  # the dilation does not divide the first side
    torch.testing.assert_close(other(x), plain(x), rtol=0, atol=0)
