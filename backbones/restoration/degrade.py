"""Degradations of training images: noise, JPEG, and Real-ESRGAN's chain for real photographs.

Xintao Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic
Data", https://arxiv.org/abs/2107.10833: blur, resize, noise and JPEG, twice, and a sinc filter for
ringing. All random numbers come from the given generator.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbones.restoration.metrics import quantize
from backbones.restoration.pictures import to_pixels, to_tensor


def add_noise(image: Tensor, sigma: float, generator: np.random.Generator) -> Tensor:
    """Add Gaussian noise of ``sigma`` of 255 to (C, H, W) in 0 … 1, without clipping."""
    noise = generator.standard_normal(tuple(image.shape), dtype=np.float32)
    return image + torch.from_numpy(noise) * (sigma / 255)


def compress(image: Tensor, quality: int) -> Tensor:
    """Compress (C, H, W) in 0 … 1 as JPEG of ``quality`` 1 … 100 and decode it; C is 1 or 3.

    Uses 4:2:0 chroma subsampling, like Pillow and most cameras.
    """
    data = io.BytesIO()
    pixels = to_pixels(image)
    Image.fromarray(pixels.squeeze(2) if len(image) == 1 else pixels).save(
        data, format="JPEG", quality=quality
    )
    with Image.open(data) as decoded:
        return to_tensor(np.array(decoded).reshape(pixels.shape), len(image))


def blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel of (C, H, W) with a kernel of odd sides; edges are mirrored.

    A kernel larger than the mirrored image loses its rim.
    """
    cuts = [max(k // 2 - n + 1, 0) for k, n in zip(kernel.shape, image.shape[1:], strict=True)]
    if any(cuts):
        kernel = kernel[cuts[0] : kernel.shape[0] - cuts[0], cuts[1] : kernel.shape[1] - cuts[1]]
        kernel = kernel / kernel.sum()
    above, before = (side // 2 for side in kernel.shape)
    padded = F.pad(image.unsqueeze(1), (before, before, above, above), mode="reflect")
    return F.conv2d(padded, kernel.to(image)[None, None]).squeeze(1)


def gaussian_kernel(
    size: int,
    sigmas: tuple[float, float],
    angle: float = 0.0,
    shape: float = 1.0,
    plateau: bool = False,
) -> Tensor:
    """A Gaussian of (size, size), or one of its two generalisations.

    Args:
        sigmas: along both axes, in pixels.
        angle: that the first axis is turned by.
        shape: β; with r² the squared distance in sigmas the density is exp(-r²^β / 2), or with
            ``plateau`` 1 / (1 + r²^β).
    """
    positions = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(positions, positions, indexing="ij")
    along = (x * math.cos(angle) + y * math.sin(angle)) / sigmas[0]
    across = (y * math.cos(angle) - x * math.sin(angle)) / sigmas[1]
    distance = (along**2 + across**2) ** shape
    density = 1 / (1 + distance) if plateau else torch.exp(-distance / 2)
    return (density / density.sum()).float()


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """A circular sinc (low-pass) filter of (size, size); ``cutoff`` in radians per pixel."""
    positions = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    radius = (positions[:, None] ** 2 + positions**2).sqrt()
    centre = radius == 0
    safe = radius.masked_fill(centre, 1.0)
    values = cutoff * torch.special.bessel_j1(cutoff * safe) / (2 * math.pi * safe)
    values = values.masked_fill(centre, cutoff**2 / (4 * math.pi))
    return (values / values.sum()).float()


def sharpen(image: Tensor) -> Tensor:
    """Half-strength unsharp masking where edges are stronger than 10 of 255, softly blended."""
    size = 51
    # OpenCV's rule for the sigma of a Gaussian that is given by its size.
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    taps = gaussian_kernel(size, (sigma, sigma)).sum(0, keepdim=True)
    residual = image - blur(blur(image, taps), taps.T)
    mask = (residual.abs() * 255 > 10).to(image)
    sharp = (image + 0.5 * residual).clamp(0, 1)
    soft = blur(blur(mask, taps), taps.T)
    return soft * sharp + (1 - soft) * image


@dataclass(frozen=True)
class Pass:
    """Ranges of one of the two passes, from the paper's supplement."""

    blur: float  # probability
    sigma: tuple[float, float]  # of the blur, in pixels
    resize: tuple[float, float, float]  # probabilities of enlarging, reducing, keeping the size
    factor: tuple[float, float]
    noise: tuple[float, float]  # σ of Gaussian noise, of 255
    shot: tuple[float, float]  # scale of Poisson noise


FIRST_PASS = Pass(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0))
SECOND_PASS = Pass(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5))
_QUALITY = (30, 96)  # the end is excluded
_KERNELS = ("iso", "aniso", "general iso", "general aniso", "plateau iso", "plateau aniso")
_KERNEL_SHARES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
_SINC, _FINAL_SINC, _GREY_NOISE, _GAUSSIAN_NOISE = 0.1, 0.8, 0.4, 0.5


def real_world(image: Tensor, scale: int, generator: np.random.Generator) -> Tensor:
    """Degrade an image with Real-ESRGAN's chain.

    (3, H, W) in 0 … 1, sides multiples of ``scale`` → (3, H / scale, W / scale), rounded to 8 bits.
    """
    height, width = image.shape[1:]
    x = _degrade_once(image, FIRST_PASS, (height, width), generator)
    x = compress(x, int(generator.integers(*_QUALITY)))
    x = _degrade_once(x, SECOND_PASS, (height // scale, width // scale), generator)
    last = None
    if generator.random() < _FINAL_SINC:
        last = sinc_kernel(_odd(generator), float(generator.uniform(math.pi / 3, math.pi)))
    jpeg = int(generator.integers(*_QUALITY))
    compress_first = generator.random() < 0.5
    if compress_first:
        x = compress(x, jpeg)
    x = _resize(x, (height // scale, width // scale), generator)
    if last is not None:
        x = blur(x, last)
    if not compress_first:
        x = compress(x, jpeg)
    return quantize(x)


def _degrade_once(
    x: Tensor, ranges: Pass, reference: tuple[int, int], generator: np.random.Generator
) -> Tensor:
    """Blur, resize to a random fraction of ``reference``, noise."""
    if generator.random() < ranges.blur:
        x = blur(x, _random_kernel(ranges.sigma, generator))
    kind = generator.choice(3, p=ranges.resize)
    low, high = ranges.factor
    factor = (generator.uniform(1, high), generator.uniform(low, 1), 1.0)[kind]
    x = _resize(x, tuple(max(int(side * factor), 1) for side in reference), generator)
    grey = generator.random() < _GREY_NOISE
    if generator.random() < _GAUSSIAN_NOISE:
        channels = 1 if grey else 3
        flat = torch.zeros(channels, *x.shape[1:])
        x = x + add_noise(flat, generator.uniform(*ranges.noise), generator)
    else:
        x = x + _shot_noise(x, grey, generator.uniform(*ranges.shot), generator)
    return x.clamp(0, 1)


def _shot_noise(x: Tensor, grey: bool, scale: float, generator: np.random.Generator) -> Tensor:
    """Poisson noise with as many photons as the image has grey levels."""
    if grey:
        x = (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).unsqueeze(0)
    x = quantize(x)
    levels = 2.0 ** math.ceil(math.log2(max(len(x.unique()), 2)))
    counts = generator.poisson(x.double().numpy() * levels) / levels
    return (torch.from_numpy(counts).float() - x) * scale


def _random_kernel(sigma: tuple[float, float], generator: np.random.Generator) -> Tensor:
    size = _odd(generator)
    if generator.random() < _SINC:
        lowest = math.pi / 3 if size < 13 else math.pi / 5
        return sinc_kernel(size, float(generator.uniform(lowest, math.pi)))
    kind = str(generator.choice(_KERNELS, p=_KERNEL_SHARES))
    first = second = float(generator.uniform(*sigma))
    angle = 0.0
    if kind.endswith("aniso"):
        second = float(generator.uniform(*sigma))
        angle = float(generator.uniform(-math.pi, math.pi))
    shape = 1.0
    if kind.startswith("general"):
        shape = _around_one(0.5, 4.0, generator)
    elif kind.startswith("plateau"):
        shape = _around_one(1.0, 2.0, generator)
    return gaussian_kernel(size, (first, second), angle, shape, kind.startswith("plateau"))


def _around_one(low: float, high: float, generator: np.random.Generator) -> float:
    """A random value, below and above 1 with equal probability."""
    bounds = (low, 1.0) if generator.random() < 0.5 else (1.0, high)
    return float(generator.uniform(*bounds))


def _odd(generator: np.random.Generator) -> int:
    """Side of a kernel: 7, 9, …, 21."""
    return 2 * int(generator.integers(3, 11)) + 1


def _resize(x: Tensor, size: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """Resize by area, bilinear or bicubic interpolation, at random."""
    mode = str(generator.choice(("area", "bilinear", "bicubic")))
    options = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(x.unsqueeze(0), size=size, mode=mode, **options).squeeze(0)
