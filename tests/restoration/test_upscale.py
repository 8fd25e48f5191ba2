"""Upscaling pictures: tiles, memory, self-ensemble, greyscale, alpha, 16 bits."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from fresh_python import run_code
from PIL import Image
from torch import Tensor, nn

import backbones
from backbones.common.memory import peak_memory, used_memory
from backbones.restoration.pictures import Picture
from backbones.restoration.resize import resize_bicubic
from backbones.restoration.upscale import Upscaler, upscale


class Bicubic(nn.Module):
    """Sees two pixels around; counts what it is called with."""

    upscale, window_size = 2, 8

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return resize_bicubic(x, 2.0) * self.weight


def pixels(*shape: int, kind: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, shape, dtype=kind)


def expected(array: np.ndarray) -> np.ndarray:
    limit = float(np.iinfo(array.dtype).max)
    x = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / limit
    large = resize_bicubic(x, 2.0).clamp(0, 1).permute(1, 2, 0)
    return (large * limit).round().numpy().astype(array.dtype)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("colours", [1, 3])
def test_channels_and_depth(kind, in_chans, colours):
    array = pixels(20, 31, colours, kind=kind)
    out = Upscaler(Bicubic(in_chans))(array)
    assert out.dtype == kind and difference(out, expected(array)) <= 1
    flat = Upscaler(Bicubic(in_chans))(array[:, :, 0])
    assert flat.shape == (40, 62)


def test_alpha_and_kinds():
    array, alpha = pixels(10, 12, 3), np.full((10, 12), 255, np.uint8)
    alpha[:, :6] = 0
    picture = Upscaler(Bicubic())(Picture(array, alpha, icc=b"x"))
    assert picture.icc == b"x" and picture.alpha.shape == (20, 24)
    assert set(picture.alpha[:, :8].flatten()) == {0}
    assert set(picture.alpha[:, -8:].flatten()) == {255}
    assert (np.diff(picture.alpha.astype(int)) >= 0).all()
    image = upscale(Bicubic(), Image.fromarray(np.dstack([array, alpha])))
    assert image.mode == "RGBA" and np.array_equal(np.asarray(image)[:, :, :3], picture.pixels)
    data = io.BytesIO()
    Image.fromarray(np.dstack([array, alpha])).save(data, "PNG")
    with Image.open(data) as read:  # which has a format and no file name
        assert np.array_equal(np.asarray(upscale(Bicubic(), read)), np.asarray(image))
    grey = upscale(Bicubic(), Image.fromarray(array[:, :, 0]))
    assert grey.mode == "L" and grey.size == (24, 20)
    kept = Upscaler(backbones.create_model("hat_nano_x2", upscale=1))(Picture(array, alpha))
    assert kept.alpha is alpha and kept.pixels.shape == array.shape


@pytest.mark.parametrize(("height", "rows"), [(50, 4), (16, 1)])
def test_tiles_of_a_model_that_sees_less_than_the_overlap(height, rows):
    """They change nothing, whatever way they are blended."""
    array = pixels(height, 70, 3)
    model = Bicubic()
    calls: list[int] = []
    upscaler = Upscaler(model, tile=16, overlap=8)
    out = upscaler(array, lambda: calls.append(1))
    assert difference(out, expected(array)) == 0
    assert len(calls) == len(model.seen) == upscaler.tiles(height, 70) == rows * 5
    assert max(max(shape[2:]) for shape in model.seen) == 16 + 2 * 8


class Shifted(Bicubic):
    """With a slope to the right, and more red."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        red = torch.tensor([0.03, 0, 0]).view(3, 1, 1)
        return out + torch.linspace(0, 0.1, out.shape[3]) + red


def test_self_ensemble():
    """Each result is turned back, and slopes of all directions cancel."""
    model, array = Bicubic(), pixels(16, 24, 3)
    assert difference(upscale(model, array, tta=True, tile=None), expected(array)) <= 1
    assert [shape[2:] for shape in model.seen] == 2 * (2 * [(16, 24)] + 2 * [(24, 16)])
    out = upscale(Shifted(), np.full((16, 16, 1), 100, np.uint8), tta=True, tile=None)
    # A grey picture is the mean of the colours.
    assert set(out.flatten()) == {round(100 + (0.05 + 0.01) * 255)}


def test_autocast():
    torch.manual_seed(0)
    model = backbones.create_model("hat_nano_x2")
    kinds: list[torch.dtype] = []
    model.head.conv_out.register_forward_hook(lambda _m, _i, out: kinds.append(out.dtype))
    array = pixels(16, 16, 3)
    assert difference(upscale(model, array, amp=True), upscale(model, array)) <= 2
    assert kinds == [torch.bfloat16, torch.float32]


def test_auto_tiles_follow_the_limit():
    """Larger with more memory, as the peak of a process shows below; the window's multiples."""
    model = backbones.create_model("hat_nano_x2")
    plenty = Upscaler(model, max_memory=2**40)
    assert plenty.tile_side(2000, 3000) == 3000 and plenty.tiles(2000, 3000) == 1
    used = used_memory(torch.device("cpu"))
    assert used <= 1.1 * 2**20 * peak_memory(torch.device("cpu"))  # unlike the address space
    sides = [
        Upscaler(model, max_memory=used + mebibytes * 2**20).tile_side(1000, 1000)
        for mebibytes in (160, 300, 1000)
    ]
    assert sides == sorted(set(sides)) and all(side % 8 == 0 for side in sides)
    for side in sides:  # smaller ones would be more tiles
        fewer, more = (Upscaler(model, tile=n).tiles(1000, 1000) for n in (side, side - 8))
        assert fewer < more
    with pytest.raises(ValueError, match="an image of 0×64 has no pixels"):
        Upscaler(model, max_memory=used)(pixels(0, 64, 3))
    with pytest.raises(ValueError, match=r"max_memory is not enough .* MiB are missing"):
        Upscaler(model, max_memory=2**20)(pixels(64, 64, 3))


_PEAK = """
import sys
from pathlib import Path
import numpy as np
import torch
from torch import nn
import backbones
from backbones.restoration.upscale import Upscaler
from backbones.common.memory import used_memory

class Wide(nn.Sequential):
    upscale, in_chans, window_size = 2, 3, 16

torch.set_num_threads(1)
if sys.argv[1] == "wide":
    wide = nn.Conv2d(3, 64, 1), nn.GELU(), nn.Conv2d(64, 12, 3, padding=1), nn.PixelShuffle(2)
    model = Wide(*wide)
else:
    model = backbones.create_model(sys.argv[1])
    if "fused" in sys.argv:
        model.fuse()
side, spare = int(sys.argv[2]), int(sys.argv[3]) * 2**20
array = np.zeros((side, side, 3), np.uint8)
Upscaler(model, tile=None)(array[:32, :32])  # what torch loads at its first call is no tile's
limit = used_memory(torch.device("cpu")) + spare
upscaler = Upscaler(model, max_memory=limit)
tiles = upscaler.tiles(side, side)
upscaler(array)
# Not ru_maxrss: it starts with what the process had that this one was started from.
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
peak = 1024 * int(status["VmHWM"].split()[0])
print(tiles, limit, peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
@pytest.mark.parametrize(
    ("model", "side", "spares"),
    [
        ("wide", 448, (80, 1000)),
        pytest.param("hat_nano_x2", 256, (80, 1000), marks=pytest.mark.slow),
        pytest.param("hat_nano_x2 fused", 384, (80, 1000), marks=pytest.mark.slow),
    ],
)
def test_peak_memory_stays_below_the_limit(model, side, spares, tmp_path):
    """Measured in processes of their own: less memory, more tiles, and never above it."""
    found = []
    for spare in spares:
        name, *fused = model.split()
        said = run_code(_PEAK, tmp_path, name, str(side), str(spare), *fused)
        tiles, limit, peak = map(int, said.split())
        assert peak <= limit
        found.append((tiles, peak))
    assert found[0][0] > 1 == found[1][0]
    assert found[1][1] - found[0][1] > 50 * 2**20  # without tiles it takes far more


def test_bad_arguments_are_named():
    model = Bicubic()
    for keywords, message in (
        ({"tile": 12}, "tile must be a multiple of the model's window of 8, got 12"),
        ({"overlap": -8}, "overlap must be a multiple .* got -8"),
        ({"tile": 0}, "tile must be positive"),
        ({"tile": "all"}, "'auto' or None, got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            Upscaler(model, **keywords)
    with pytest.raises(ValueError, match="Linear does not output images"):
        Upscaler(nn.Linear(2, 2))
    for array in (pixels(4, 4, 2), pixels(4, 4, 3).astype(np.float32)):
        with pytest.raises(ValueError, match="of uint8 or uint16, got"):
            Upscaler(model)(array)
    with pytest.raises(ValueError, match="mode I;16 lose bits"):
        upscale(model, Image.fromarray(pixels(4, 4, kind=np.uint16)))
