"""PSNR and SSIM against scikit-image, and the luma of papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from backbones.restoration.metrics import luma, psnr, quality, quantize, ssim


def pair(channels: int = 3, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand((channels, 12, 15), generator=generator)
    truth = torch.nn.functional.interpolate(smooth[None], (50, 61), mode="bilinear")[0]
    image = truth + noise * torch.randn(truth.shape, generator=generator)
    return quantize(image), quantize(truth)


def test_luma():
    """scikit-image's rgb2ycbcr, and the ends of the studio range."""
    image, _ = pair()
    expected = rgb2ycbcr(image.double().permute(1, 2, 0).numpy())[..., 0] / 255
    np.testing.assert_allclose(luma(image.double())[0].numpy(), expected, atol=1e-12)
    assert luma(torch.zeros(3, 1, 1)).item() == pytest.approx(16 / 255)
    assert luma(torch.ones(3, 1, 1)).item() == pytest.approx(235 / 255)
    grey = torch.rand(1, 4, 4)
    assert luma(grey) is grey
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        luma(torch.zeros(2, 4, 4))


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_against_scikit_image(noise):
    image, truth = pair(noise=noise)
    figures = quality(image, truth, border=4)
    x, y = (luma(t.double())[0, 4:-4, 4:-4].numpy() for t in (image, truth))
    assert figures["psnr_y"] == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1), abs=1e-4)
    expected = structural_similarity(
        x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1
    )
    assert figures["ssim_y"] == pytest.approx(expected, abs=1e-6)


def test_by_hand():
    truth = torch.zeros(1, 16, 16)
    assert psnr(truth + 0.1, truth) == pytest.approx(20, abs=1e-5)
    assert psnr(truth, truth) == math.inf and ssim(truth, truth) == 1
    # A border of wrong pixels does not count; values are rounded to 8 bits and clipped.
    image = truth.clone()
    image[:, :2] = 1
    image[:, 2:] = -0.3
    assert quality(image, truth, border=2)["psnr_y"] == math.inf


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"differ: \(1, 9, 9\), \(1, 9, 8\)"):
        psnr(torch.zeros(1, 9, 9), torch.zeros(1, 9, 8))
    with pytest.raises(ValueError, match="needs 11×11 pixels, got 9×12"):
        ssim(torch.zeros(1, 9, 12), torch.zeros(1, 9, 12))
