"""Multi-scale deformable attention against sums over all pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparisons import assert_same_with_gradients
from torch import Tensor

from ops.attention.deformable import DeformableAttention, deformable_attention, pixel_centres

SIZES = ((3, 5), (2, 2), (1, 4))


def dense(value: Tensor, sizes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """The definition: each sample's share of every pixel, which is zero but for the nearest."""
    out, start = torch.zeros(()), 0
    for level, (height, width) in enumerate(sizes):
        places = locations[:, :, :, level] * locations.new_tensor([width, height]) - 0.5
        columns, rows = (
            (1 - (place[..., None] - torch.arange(n)).abs()).relu()
            for place, n in zip(places.unbind(-1), (width, height), strict=True)
        )
        shares = torch.einsum("bnhp,bnhpy,bnhpx->bnhyx", weights[:, :, :, level], rows, columns)
        pixels = value[:, start : start + height * width]
        out = out + torch.einsum("bnhs,bshd->bnhd", shares.flatten(3), pixels)
        start += height * width
    return out.flatten(2)


def _inputs(sizes: Any) -> list[Tensor]:
    """Two images, two heads of three channels, three queries of two points a map."""
    torch.manual_seed(0)
    value = torch.randn(2, sum(h * w for h, w in sizes), 2, 3, dtype=torch.float64)
    locations = torch.rand(2, 3, 2, len(sizes), 2, 2).double() * 1.4 - 0.2  # some of them outside
    return [
        t.requires_grad_() for t in (value, locations, torch.rand(2, 3, 2, len(sizes), 2).double())
    ]


@pytest.mark.parametrize("sizes", [SIZES, ((4, 3),), ((1, 1), (1, 1))])
def test_is_its_definition_with_its_gradients(sizes: Any) -> None:
    value, *others = tensors = _inputs(sizes)
    ours, theirs = (f(value, sizes, *others) for f in (deformable_attention, dense))
    assert_same_with_gradients(ours, theirs, tensors)


def test_a_sample_at_a_centre_is_the_pixel() -> None:
    for size in SIZES:
        centres = pixel_centres([size])
        value = torch.randn(1, len(centres), 1, 4)
        places, weights = centres[None, :, None, None, None], torch.ones(1, len(centres), 1, 1, 1)
        out = deformable_attention(value, [size], places, weights)
        torch.testing.assert_close(out, value[:, :, 0])
    assert torch.equal(pixel_centres(SIZES)[15:19], pixel_centres([(2, 2)]))
    assert pixel_centres([(2, 4)])[1].tolist() == [0.375, 0.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_only_rounds_the_values(dtype: torch.dtype, autocast: bool) -> None:
    """Positions stay in float32: on 1 × 1000 pixels, bfloat16 would be off by two."""
    centres = pixel_centres([(1, 1000)])
    value = torch.arange(1000.0).view(1, 1000, 1, 1) / 1000
    arguments = ([(1, 1000)], centres[None, :, None, None, None], torch.ones(1, 1000, 1, 1, 1))
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = deformable_attention(value.to(dtype), *arguments)
    assert out.dtype == dtype
    torch.testing.assert_close(out[..., 0], value[..., 0, 0].to(dtype), rtol=0, atol=1e-2)
    assert len(out.unique()) == len(value.to(dtype).unique())
    # Locations given in half precision are not rounded again.
    given = [t.to(dtype) for t in (torch.arange(1000.0).view(1, 1000, 1, 1) % 2, *arguments[1:])]
    exact = deformable_attention(given[0].float(), [(1, 1000)], *(t.float() for t in given[1:]))
    out = deformable_attention(given[0], [(1, 1000)], *given[1:])
    torch.testing.assert_close(out, exact.to(dtype))


@pytest.mark.parametrize("value_ratio", [1.0, 0.5])
def test_layer_samples_around_its_references(value_ratio: float) -> None:
    torch.manual_seed(0)
    layer = DeformableAttention(8, 2, 3, 2, value_ratio=value_ratio).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    query, features = torch.randn(2, 4, 8).double(), torch.randn(2, 23, 8).double()
    references = torch.rand(4, 2).double()
    offsets = layer.sampling_offsets(query).view(2, 4, 2, 3, 2, 2)
    locations = torch.stack(
        [
            references[:, None, None] + offsets[:, :, :, level] / torch.tensor([width, height])
            for level, (height, width) in enumerate(SIZES)
        ],
        dim=3,
    )
    weights = layer.attention_weights(query).view(2, 4, 2, 6).softmax(-1).view(2, 4, 2, 3, 2)
    value = layer.value_proj(features).view(2, 23, 2, -1)
    expected = layer.output_proj(dense(value, SIZES, locations, weights))
    torch.testing.assert_close(layer(query, references, features, SIZES), expected)


def test_layer_starts_with_equal_weights_on_rays() -> None:
    layer = DeformableAttention(8, 4, 2, 3)
    offsets = layer.sampling_offsets(torch.randn(1, 1, 8)).view(4, 2, 3, 2)
    rays = torch.tensor([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])
    expected = rays[:, None, None] * torch.tensor([1.0, 2.0, 3.0])[:, None]
    torch.testing.assert_close(offsets, expected.expand(-1, 2, -1, -1))
    assert not layer.attention_weights(torch.randn(1, 1, 8)).any()
