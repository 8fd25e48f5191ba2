"""ImageNet-C's corruptions (https://arxiv.org/abs/1903.12261), by the package imagecorruptions."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image

from backbones.common.errors import RecipeError

ALEXNET_ERROR = {
    **{"gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640},
    **{"defocus_blur": 81.9880, "glass_blur": 82.6268, "motion_blur": 78.5948},
    **{"zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572, "fog": 81.9324},
    **{"brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056},
    **{"pixelate": 71.7840, "jpeg_compression": 60.6500},
}
"""AlexNet's top-1 error in percent, averaged over the five severities, the paper's baseline.

Taken from AugMix's ``imagenet.py``, which has them from https://github.com/hendrycks/robustness.
"""

CORRUPTIONS = tuple(ALEXNET_ERROR)
"""The fifteen corruptions of the benchmark."""


class Corruption:
    """A corruption of RGB images of 32×32 pixels or more.

    It is deterministic per image, except impulse_noise and glass_blur, which the package offers no
    seed for. It is of :data:`CORRUPTIONS`, or speckle_noise, gaussian_blur, spatter or saturate.
    """

    def __init__(self, name: str, severity: int) -> None:
        try:
            from imagecorruptions import corrupt, get_corruption_names
        except ImportError:
            raise RecipeError(
                "corruptions need a package: pip install imagecorruptions-imaug"
            ) from None
        known = get_corruption_names("all")
        if name not in known or not 1 <= severity <= 5:
            raise RecipeError(
                f"unknown corruption {name!r} or severity {severity}; known are 1 … 5 of "
                f"{', '.join(known)}"
            )
        self.severity = severity
        self._corrupt = partial(corrupt, corruption_name=name, severity=severity)

    def __call__(self, image: Image.Image) -> Image.Image:
        pixels = np.asarray(image.convert("RGB"))
        if min(pixels.shape[:2]) < 32:
            raise RecipeError(f"corruptions need images of at least 32×32 pixels, not {image.size}")
        before = np.random.get_state()
        np.random.seed(zlib.crc32(pixels.tobytes()))
        try:
            return Image.fromarray(self._corrupt(pixels)).convert(image.mode)
        finally:
            np.random.set_state(before)


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]], baseline: Mapping[str, float] | None = None
) -> float:
    """The mean over the corruptions of the mean error over the severities, in percent.

    Each corruption's is divided by its ``baseline`` if given: :data:`ALEXNET_ERROR` for the paper's
    mCE.
    """
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    if baseline is not None:
        means = {name: 100 * value / baseline[name] for name, value in means.items()}
    return sum(means.values()) / len(means)
