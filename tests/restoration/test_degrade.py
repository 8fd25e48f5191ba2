"""Noise, JPEG, and the chain of Real-ESRGAN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backbones.restoration import degrade


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def smooth(height: int = 48, width: int = 64, channels: int = 3) -> Tensor:
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
    waves = [0.5 + 0.4 * torch.sin(7 * rows + (3 + c) * columns + c) for c in range(channels)]
    return torch.stack(waves)


@pytest.mark.parametrize("sigma", [15.0, 25.0, 50.0])
def test_noise(sigma):
    image = torch.full((3, 100, 100), 0.5)
    noisy = degrade.add_noise(image, sigma, generator())
    assert (noisy - image).std().item() * 255 == pytest.approx(sigma, rel=0.02)
    assert (noisy - image).mean().item() * 255 == pytest.approx(0, abs=0.03 * sigma)
    assert torch.equal(noisy, degrade.add_noise(image, sigma, generator()))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg(channels):
    image = smooth(channels=channels)
    errors = [(degrade.compress(image, q) - image).abs().mean().item() for q in (10, 40, 95)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.01
    out = degrade.compress(image, 10)
    assert out.shape == image.shape and torch.equal(out, (out * 255).round() / 255)


def test_kernels():
    even = degrade.gaussian_kernel(21, (2.0, 2.0))
    places = torch.arange(21.0) - 10
    taps = torch.exp(-(places**2) / 8)
    torch.testing.assert_close(even, torch.outer(taps, taps) / taps.sum() ** 2)
    long = degrade.gaussian_kernel(21, (3.0, 1.0), angle=math.pi / 2)
    assert long.sum(1)[0] > 5 * long.sum(0)[0]  # the first axis has been turned upright
    for kernel in (
        long,
        degrade.gaussian_kernel(9, (2, 2), shape=0.7),
        degrade.gaussian_kernel(9, (2, 2), shape=1.5, plateau=True),
        degrade.sinc_kernel(9, 1.2),
    ):
        assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(kernel, kernel.flip(0, 1))
    assert degrade.sinc_kernel(21, math.pi / 3).min() < 0  # it rings


class Fixed:
    """A generator of always the same draws: the lowest of a range, except for kernels' sizes."""

    def __init__(self, share: float, half: int = 3) -> None:
        self.share, self.half = share, half
        self.ranges: list[tuple[float, float]] = []
        self.shapes: list[tuple[int, ...]] = []

    def integers(self, low: int, high: int) -> int:
        return self.half if high == 11 else low

    def random(self) -> float:
        return self.share

    def uniform(self, low: float, high: float) -> float:
        self.ranges.append((low, high))
        return low

    def choice(self, options: Any, p: Any = None) -> Any:
        return 0 if options == 3 else options[0]

    def standard_normal(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        self.shapes.append(shape)
        return np.zeros(shape, dtype)

    def poisson(self, expected: np.ndarray) -> np.ndarray:
        self.shapes.append(expected.shape)
        return expected + 1


@pytest.mark.parametrize(("half", "cutoff"), [(3, math.pi / 3), (6, math.pi / 5)])
def test_small_sinc_kernels_cut_off_higher(half, cutoff):
    """Of 7 and of 13 pixels."""
    draws: Any = Fixed(0.0, half)
    degrade.real_world(smooth(), 2, draws)
    sinc = [low for low, high in draws.ranges if high == math.pi]
    assert sinc == [cutoff, cutoff, math.pi / 3]  # both passes, and the last one whatever its size


def test_plateau_kernels_are_among_those_drawn(monkeypatch):
    kernels, draws = list[Tensor](), Fixed(0.45)
    monkeypatch.setattr(draws, "choice", lambda options, p=None: 0 if options == 3 else options[-1])
    monkeypatch.setattr(degrade, "blur", lambda x, kernel: kernels.append(kernel) or x)
    degrade.real_world(smooth(), 2, draws)
    plateau = degrade.gaussian_kernel(7, (0.2, 0.2), -math.pi, plateau=True)
    assert any(torch.allclose(kernel, plateau) for kernel in kernels)


@pytest.mark.parametrize(("share", "channels"), [(0.3, 1), (0.45, 3), (0.6, 3)])
def test_noise_is_grey_in_two_of_five(share, channels):
    draws: Any = Fixed(share)
    out = degrade.real_world(torch.full((3, 16, 16), 0.5), 1, draws)
    assert [shape[0] for shape in draws.shapes] == [channels] * 2
    # Gaussian noise of 0, or in half of all pictures a photon too many at the lowest scale.
    assert out.mean().item() == pytest.approx(0.5 if share < 0.5 else 0.55, abs=0.01)


def test_a_kernel_of_one_point_changes_nothing():
    image, kernel = smooth(), torch.zeros(7, 7)
    kernel[3, 3] = 1
    torch.testing.assert_close(degrade.blur(image, kernel), image)


def test_sharpen():
    """Flat parts stay, edges get steeper."""
    image = torch.full((3, 40, 80), 0.3)
    torch.testing.assert_close(degrade.sharpen(image), image)
    image[:, :, 40:] = 0.7
    sharp = degrade.sharpen(image)
    assert sharp[:, :, 39].mean() < 0.28 and sharp[:, :, 40].mean() > 0.72
    assert sharp.min() >= 0 and sharp.max() <= 1


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_real_world(scale):
    image = smooth(64, 96)
    results = []
    for seed in range(12):
        out = degrade.real_world(image, scale, generator(seed))
        assert out.shape == (3, 64 // scale, 96 // scale)
        assert out.min() >= 0 and out.max() <= 1
        torch.testing.assert_close(out * 255, (out * 255).round(), atol=1e-4, rtol=0)
        # It remains the same picture, however spoilt.
        assert (out.mean((1, 2)) - image.mean((1, 2))).abs().max() < 0.1
        results.append(out)
        small = degrade.real_world(smooth(8, 8), scale, generator(seed))
        assert small.shape == (3, 8 // scale, 8 // scale)
    assert len({round(float(r.std()), 6) for r in results}) == 12
    assert torch.equal(results[0], degrade.real_world(image, scale, generator(0)))
