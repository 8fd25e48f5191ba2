"""Helpers for describing published weights: their cfg, and the renaming of their tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from backbones.core.base import StagedBackbone


def imagenet_cfg(model_class: type[StagedBackbone]) -> dict[str, Any]:
    """The usual entries of a cfg for ImageNet-1k at 224×224; a family's own follow them."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": model_class.first_conv,
        "classifier": model_class.classifier,
    }


def renamed(key: str, renames: Sequence[tuple[str, str]]) -> str:
    """``key`` after all replacements ``(regular expression, replacement)``, in order."""
    for pattern, name in renames:
        key = re.sub(pattern, name, key)
    return key


def renamed_stage(key: str, prefixes: Sequence[tuple[str, str]]) -> str:
    """``key`` with the first matching prefix replaced, for stages that are counted from 1.

    Args:
        prefixes: ``(regular expression, replacement)``; the expression's group is the number of a
            stage, which fills the replacement's ``{}`` counted from 0.
    """
    for pattern, prefix in prefixes:
        if match := re.match(pattern, key):
            return prefix.format(int(match[1]) - 1) + key[match.end() :]
    return key
