"""Functions on images, maps and weights: frames, padding, tiles, folding, rounding, init."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import randomise

from ops.frames import frames_to_image
from ops.init import trunc_normal
from ops.padding import reflect_pad_to_multiple, reflected_positions
from ops.reparam import fold_norm_after, fold_norm_before, fold_scale_after
from ops.rounding import round_filters, round_keeping_sums
from ops.tiling import Tile, run_tiled, tile_spans


# ---- frames --------------------------------------------------------------------------------------
def test_tiles_keep_frames_whole() -> None:
    video = torch.randn(2, 3, 9, 4, 5)
    image = frames_to_image(video, "tiles")
    assert image.shape == (2, 3, 12, 15)
    for frame in range(9):
        i, j = divmod(frame, 3)
        tile = image[:, :, 4 * i : 4 * i + 4, 5 * j : 5 * j + 5]
        assert torch.equal(tile, video[:, :, frame])


def test_rows_put_scan_lines_side_by_side() -> None:
    """Four of them, as the published code's view of the memory has it; a frame is a band."""
    video = torch.randn(2, 3, 16, 8, 6)
    image = frames_to_image(video.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4))
    assert image.shape == (2, 3, 32, 24)
    for frame in (0, 7, 15):
        for line in range(8):
            row, place = divmod(8 * frame + line, 4)
            part = image[:, :, row, 6 * place : 6 * place + 6]
            assert torch.equal(part, video[:, :, frame, line])


# ---- padding by reflection -----------------------------------------------------------------------
@given(height=st.integers(1, 20), width=st.integers(1, 20), multiple=st.integers(1, 16))
@settings(max_examples=60)
def test_multiples(height: int, width: int, multiple: int) -> None:
    x = torch.arange(2.0 * height * width).view(1, 2, height, width)
    padded = reflect_pad_to_multiple(x, multiple)
    below, right = -height % multiple, -width % multiple
    assert (padded is x) == (below == right == 0)
    assert padded.shape == (1, 2, height + below, width + right)
    assert torch.equal(padded[:, :, :height, :width], x)
    if below < height and right < width:
        assert torch.equal(padded, F.pad(x, (0, right, 0, below), mode="reflect"))


def test_repeated_reflection() -> None:
    places = reflected_positions(torch.arange(-3, 9), 4)
    assert places.tolist() == [3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert reflected_positions(torch.arange(4), 1).tolist() == [0, 0, 0, 0]
    row = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert reflect_pad_to_multiple(row, 8)[0, 0, 0].tolist() == [1, 2, 3, 2, 1, 2, 3, 2]


# ---- tiled inference, with networks of known receptive field -------------------------------------
def grow(x: Tensor) -> Tensor:
    """Twice the size, and sees one pixel around: what lies beyond the image is zero."""
    kernel = torch.arange(1.0, 10.0, dtype=x.dtype).view(1, 1, 3, 3)
    near = F.conv2d(x.flatten(0, 1).unsqueeze(1), kernel, padding=1).view(x.shape)
    return near.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_spans() -> None:
    assert tile_spans(10, 4, 2) == [Tile(0, 4, 0, 6), Tile(4, 8, 2, 10), Tile(8, 10, 6, 10)]
    assert tile_spans(4, 8, 3) == [Tile(0, 4, 0, 4)]


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    tile_size=st.integers(1, 9),
    overlap=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=50)
def test_equals_the_whole(
    height: int, width: int, tile_size: int, overlap: int, data: st.DataObject
) -> None:
    """Tiles that read as far as the network sees change nothing, however they are blended."""
    blend = data.draw(st.integers(0, min(overlap - 1, tile_size // 2)))
    x = random(2, 3, height, width)
    tiled = run_tiled(grow, x, tile_size=tile_size, overlap=overlap, scale=2, blend=blend)
    torch.testing.assert_close(tiled, grow(x))


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((5, 6), {"tile_size": 3}, [[0] * 3 + [1] * 3] * 3 + [[2] * 3 + [3] * 3] * 2),
        ((1, 8), {"tile_size": 4, "blend": 2}, [[0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]]),
    ],
    ids=["hard", "blended"],
)
def test_seams(size: tuple[int, int], options: dict[str, int], expected: list) -> None:
    """Each tile is filled with its own number, in a channel and a dtype of its own."""
    numbers = iter(range(9))

    def number(x: Tensor) -> Tensor:
        return torch.full_like(x[:, :1], next(numbers), dtype=torch.bfloat16)

    tiled = run_tiled(number, random(1, 3, *size), overlap=2, **options)
    assert tiled.dtype == torch.bfloat16 and tiled.tolist() == [[expected]]


# ---- folding of norms and scales -----------------------------------------------------------------
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        *(lambda bias, g=g: nn.Conv2d(6, 12, 3, 2, 1, groups=g, bias=bias) for g in (1, 2, 6)),
        *(lambda bias, k=k: nn.Conv2d(6, 12, k, k, bias=bias) for k in (1, 2, 3)),
        lambda bias: nn.Linear(6, 12, bias),
    ],
)
@torch.no_grad()
def test_folding(layer: Callable[[bool], Any], bias: bool, affine: bool) -> None:
    """Of what follows any layer, and of a norm before those without padding and groups."""
    made = layer(bias).double()
    is_conv = isinstance(made, nn.Conv2d)
    x, weight = random(2, 6, *([7, 6] if is_conv else [])), made.weight.clone()
    out, kind = made(x), nn.BatchNorm2d if is_conv else nn.BatchNorm1d
    before, after = (randomise(kind(dim)).double().eval() for dim in (6, 12))
    for norm in () if affine else (before, after):
        norm.weight = norm.bias = None
    torch.testing.assert_close(fold_norm_after(made, after)(x), after(out))
    scale, shift = random(2, 12)
    for given_ in (None, shift):
        expected = out.movedim(1, -1) * scale + (0 if given_ is None else given_)
        folded = fold_scale_after(made, scale, given_)(x)
        torch.testing.assert_close(folded, expected.movedim(-1, 1))
    if not is_conv or made.padding == (0, 0):
        torch.testing.assert_close(fold_norm_before(before, made)(x), made(before(x)))
    assert torch.equal(made.weight, weight)


# ---- filters rounded with their sums -------------------------------------------------------------
_DTYPES = [torch.bfloat16, torch.float16]


def _step(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of ``dtype`` at ``x``."""
    return 2.0 ** x.abs().clamp(min=2.0**-14).log2().floor() * torch.finfo(dtype).eps


@settings(max_examples=100)
@given(
    dtype=st.sampled_from(_DTYPES),
    filters=st.integers(1, 20),
    taps=st.integers(1, 49),
    seed=st.integers(0, 99),
)
def test_sums_stay(dtype: torch.dtype, filters: int, taps: int, seed: int) -> None:
    """Up to the rounding of the smallest tap; each tap moves by at most a step of the largest."""
    weight = random(filters, taps, seed=seed).float()
    rounded = round_keeping_sums(weight, dtype)
    assert rounded.dtype == dtype and rounded.shape == weight.shape
    error = rounded.double() - weight.double()
    step = _step(weight, dtype)
    assert (error.sum(-1).abs() <= step.amax(-1) * 0.51).all()
    assert (error.abs() <= 1.01 * step.amax(-1, keepdim=True)).all()
    if taps >= 9:
        plain = (weight.to(dtype).double() - weight.double()).sum(-1)
        assert error.sum(-1).square().mean() <= plain.square().mean() + 1e-12


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_representable_numbers_stay(dtype: torch.dtype) -> None:
    weight = torch.cat((random(5, 9), torch.tensor([[torch.inf, 0.5, -torch.inf] * 3]))).to(dtype)
    assert torch.equal(round_keeping_sums(weight.float(), dtype), weight)
    weight[0, 3] = torch.nan
    assert torch.equal(round_keeping_sums(weight.float(), dtype).isnan(), weight.isnan())


def test_only_filters_change() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 4, 1), nn.Linear(4, 2)]
    model = nn.Sequential(*layers).requires_grad_(False)
    before = [layer.weight.clone() for layer in layers]
    round_filters(model, torch.float32)
    assert all(torch.equal(a.weight, b) for a, b in zip(layers, before, strict=True))
    round_filters(model, torch.bfloat16)
    changed = [not torch.equal(a.weight, b) for a, b in zip(layers, before, strict=True)]
    assert changed == [True, True, False, False]
    assert all(layer.weight.dtype == torch.float32 for layer in layers)


# ---- initial values ------------------------------------------------------------------------------
@pytest.mark.slow
def test_no_draw_falls_on_a_far_cut() -> None:
    torch.manual_seed(0)
    weights = torch.empty(50_000_000)
    trunc_normal(weights)
    assert weights.abs().max() <= 0.1
    assert weights.std().item() == pytest.approx(0.02, rel=1e-3)
