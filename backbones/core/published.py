"""Helpers for describing published weights: their cfg, and the renaming of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from backbones.core.base import StagedBackbone

Rename = tuple[str, str | Callable[[re.Match[str]], str]]


def imagenet_cfg(
    model_class: type[StagedBackbone], file: str = "", *, url: str = "{}", **entries: Any
) -> dict[str, Any]:
    """The cfg of weights, by default for ImageNet-1k at 224×224.

    Args:
        model_class: the family's class.
        file: replaces ``{}`` in ``url``.
        url: of the weights; empty if there are none.
        **entries: of the cfg, others than the usual ones or in addition to them.
    """
    return {
        "url": url.format(file),
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": model_class.first_conv,
        "classifier": model_class.classifier,
        **entries,
    }


def renamed(key: str, renames: Iterable[Rename]) -> str:
    """``key`` after all replacements, in order, as of :func:`re.sub`."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def stem_layer(match: re.Match[str]) -> str:
    """The name of a layer in a stem of convolutions, norms and activations, from its number."""
    layer, part = divmod(int(match[1]), 3)
    return f"stem.{layer}.{('conv', 'norm')[part]}."


def _counted_from_1(name: str) -> Callable[[re.Match[str]], str]:
    return lambda match: name.format(int(match[1]) - 1)


# Of originals where downsampling belongs to the previous stage.
STAGES: tuple[Rename, ...] = (
    (
        r"^(?:layers|levels)\.(\d+)\.downsample\.",
        lambda match: f"stages.{int(match[1]) + 1}.downsample.",
    ),
    (r"^(?:layers|levels)\.", "stages."),
)
# Of originals that count stages from 1.
STAGES_FROM_1: tuple[Rename, ...] = (
    (r"^patch_embed1\.proj\.", "stem.conv."),
    (r"^patch_embed1\.norm\.", "stem.norm."),
    (r"^patch_embed(\d)\.proj\.", _counted_from_1("stages.{}.downsample.conv.")),
    (r"^patch_embed(\d)\.norm\.", _counted_from_1("stages.{}.downsample.norm.")),
    (r"^blocks?(\d)\.", _counted_from_1("stages.{}.blocks.")),
    (r"^norm(\d)\.", _counted_from_1("stages.{}.norm.")),
)
