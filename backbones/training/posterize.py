"""Posterizing to 0 bits, used by RandAugment at its highest magnitude and rejected by Pillow 13.

The published recipes were trained with versions that returned a black image, as is done here.
"""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment


def allow_zero_bits(transform: Any) -> None:
    """Let every posterizing operation in a timm transform (a ``Compose``) accept 0 bits."""
    for step in getattr(transform, "transforms", []):
        if isinstance(step, (RandAugment, AugMixAugment)):
            operations = list(step.ops)
        elif isinstance(step, AutoAugment):
            operations = [op for policy in step.policy for op in policy]
        else:
            continue
        for operation in operations:
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Like timm's operation of this name; further keywords are ignored, as there."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
