"""PSNR and SSIM on luma without the border, as reported in super-resolution papers.

SSIM: Zhou Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity"
(2004). Luma: ITU-R BT.601 in the studio range 16 … 235, MATLAB's ``rgb2ycbcr``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize(image: Tensor) -> Tensor:
    """Round values in 0 … 1 to 8 bits."""
    return (image.clamp(0, 1) * 255).round() / 255


def luma(image: Tensor) -> Tensor:
    """(…, 3, H, W) in 0 … 1 → (…, 1, H, W) in 16/255 … 235/255; one channel stays as it is."""
    if image.shape[-3] == 1:
        return image
    if image.shape[-3] != 3:
        raise ValueError(f"luma needs 1 or 3 channels, got {image.shape[-3]}")
    red, green, blue = image.unbind(-3)
    return ((65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255).unsqueeze(-3)


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in 0 … 1; infinite for equal images."""
    _same_shape(image, truth)
    error = (image.double() - truth.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(image: Tensor, truth: Tensor) -> float:
    """Mean structural similarity of values in 0 … 1: Gaussian windows of 11×11, σ 1.5.

    Only windows inside the image count.
    """
    _same_shape(image, truth)
    if min(image.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs 11×11 pixels, got {image.shape[-2]}×{image.shape[-1]}")
    x, y = (t.double().reshape(-1, 1, *t.shape[-2:]) for t in (image, truth))
    taps = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    taps = torch.exp(-(taps**2) / (2 * 1.5**2))
    taps = taps / taps.sum()

    def blur(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    small, smaller = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + small) / (mean_x**2 + mean_y**2 + small)
    structure = (2 * covariance + smaller) / (var_x + var_y + smaller)
    return (luminance * structure).mean().item()


def quality(image: Tensor, truth: Tensor, border: int) -> dict[str, float]:
    """``psnr_y`` and ``ssim_y`` of an image (C, H, W) in 0 … 1, rounded to 8 bits.

    ``border`` pixels are cropped at each side; papers use the scale factor.
    """
    pair = [luma(quantize(t)) for t in (image, truth)]
    if border:
        pair = [t[..., border:-border, border:-border] for t in pair]
    return {"psnr_y": psnr(*pair), "ssim_y": ssim(*pair)}


def _same_shape(image: Tensor, truth: Tensor) -> None:
    if image.shape != truth.shape:
        raise ValueError(f"image and truth differ: {tuple(image.shape)}, {tuple(truth.shape)}")
