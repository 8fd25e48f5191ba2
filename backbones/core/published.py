"""Helpers for describing published weights: their cfg, and the renaming of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

Rename = tuple[str, str | Callable[[re.Match[str]], str]]


def imagenet_cfg(
    model_class: Any, file: str = "", *, url: str = "{}", **entries: Any
) -> dict[str, Any]:
    """The cfg of weights, by default for ImageNet-1k at 224×224; ``entries`` replace or add others.

    ``file`` replaces ``{}`` in ``url``, which is empty if there are no weights.
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


def downsampling_apart(key: str) -> str:
    """The name of a layer in EfficientViT or SHViT, which count downsampling among the blocks."""
    if match := re.match(r"patch_embed\.(?:conv)?(\d)\.", key):
        # timm counts convolutions from 1, the original also the activations between them.
        child = int(match[1]) - 1 if "conv" in match[0] else int(match[1]) // 2
        return f"stem.{child}.{key[match.end() :]}"
    if match := re.match(r"blocks(\d)\.(\d+)\.", key):
        stage, place, rest = int(match[1]) - 1, int(match[2]), key[match.end() :]
        parts = ("res1.", "patchmerge.", "res2.")
        if stage == 0 or place >= len(parts):
            place -= len(parts) if stage else 0
            return f"stages.{stage}.blocks.{place}.{rest}"
        key = f"stages.{stage}.downsample.{parts[place]}{rest}"
    key = re.sub(r"\.downsample\.res1\.", ".downsample.", key)
    key = re.sub(r"\.downsample\.patchmerge\.", ".downsample.2.", key)
    return re.sub(r"\.downsample\.res2\.(\d)\.", lambda m: f".downsample.{int(m[1]) + 3}.", key)


def _counted_from_1(name: str) -> Callable[[re.Match[str]], str]:
    return lambda match: name.format(int(match[1]) - 1)


_HEAD: Rename = (r"^head\.(weight|bias)$", r"head.fc.\1")
# Of EfficientViT and SHViT, after :func:`downsampling_apart`. A second head is for distillation.
FAST_NAMES: tuple[Rename, ...] = (
    (r"\.downsample\.2\.conv1\.", ".downsample.2.expand."),
    (r"\.downsample\.2\.conv2\.", ".downsample.2.reduce."),
    (r"\.downsample\.2\.conv3\.", ".downsample.2.project."),
    (r"^stem\.([012])\.(weight|bias)$", r"stem.\1.conv.\2"),
    (r"^head(_dist)?\.norm\.", r"head.fc\1.norm."),
    (r"^head(_dist)?\.l(?:inear)?\.", r"head.fc\1.linear."),
    (r"^head(_dist)?\.(weight|bias)$", r"head.fc\1.\2"),
)
# Of originals in Swin Transformer's layout, where downsampling belongs to the previous stage.
SWIN_NAMES: tuple[Rename, ...] = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (
        r"^(?:layers|levels)\.(\d+)\.downsample\.",
        lambda match: f"stages.{int(match[1]) + 1}.downsample.",
    ),
    (r"^(?:layers|levels)\.", "stages."),
    (r"^norm(\d)\.", r"out_norms.\1."),
    _HEAD,
)
# Of originals in VMamba's layout.
VMAMBA_NAMES: tuple[Rename, ...] = (
    (r"^patch_embed\.(?:proj|0)\.", "stem.0.conv."),
    (r"^patch_embed\.(?:norm|2)\.", "stem.0.norm."),
    (r"^patch_embed\.5\.", "stem.2.conv."),
    (r"^patch_embed\.7\.", "stem.2.norm."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"^outnorm(\d+)\.", r"out_norms.\1."),
    (r"^classifier\.", ""),
    *SWIN_NAMES,
)
# Of originals in the layout of PVT, which count stages from 1.
PVT_NAMES: tuple[Rename, ...] = (
    (r"^patch_embed1\.proj\.", "stem.conv."),
    (r"^patch_embed1\.norm\.", "stem.norm."),
    (r"^patch_embed(\d)\.proj\.", _counted_from_1("stages.{}.downsample.conv.")),
    (r"^patch_embed(\d)\.norm\.", _counted_from_1("stages.{}.downsample.norm.")),
    (r"^blocks?(\d)\.", _counted_from_1("stages.{}.blocks.")),
    (r"^norm(\d)\.", _counted_from_1("stages.{}.norm.")),
    _HEAD,
)
