"""Helpers for describing published weights: their cfg, and the renaming of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

Rename = tuple[str, str | Callable[[re.Match[str]], str]]


def imagenet_cfg(file: str = "", *, url: str = "{}", **entries: Any) -> dict[str, Any]:
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
        **entries,
    }


def renamed(key: str, renames: Iterable[Rename]) -> str:
    """``key`` after all replacements, in order, as of :func:`re.sub`."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def children(path: str, *names: str | None) -> tuple[Rename, ...]:
    """Renames of the layers of a ``Sequential``, by their numbers; None for those without tensors.

    ``path`` is the pattern of its path, which the names replace.
    """
    numbered = ((i, name) for i, name in enumerate(names) if name is not None)
    return tuple((rf"{path}\.{i}\.", f"{name}.") for i, name in numbered)


def stem_layer(match: re.Match[str]) -> str:
    """The name of a layer in a stem of convolutions, norms and activations, from its number."""
    layer, part = divmod(int(match[1]), 3)
    return f"stem.{layer}.{('conv', 'norm')[part]}."


def _fast_stem_layer(match: re.Match[str]) -> str:
    # timm counts convolutions from 1, the original also the activations between them.
    return f"stem.{int(match[2]) - 1 if match[1] else int(match[2]) // 2}."


def _fast_block(match: re.Match[str]) -> str:
    """The name of a block, or of a part of the downsampling, which is counted among them."""
    stage, place = int(match[1]) - 1, int(match[2])
    parts = ("", "2.", "res2.") if stage else ()
    if place >= len(parts):
        return f"stages.{stage}.blocks.{place - len(parts)}."
    return f"stages.{stage}.downsample.{parts[place]}"


def _counted_from_1(name: str) -> Callable[[re.Match[str]], str]:
    return lambda match: name.format(int(match[1]) - 1)


_HEAD: Rename = (r"^head\.(weight|bias)$", r"head.fc.\1")
# Of EfficientViT's and SHViT's blocks and downsampling, by the original and by timm.
FAST_BLOCKS: tuple[Rename, ...] = (
    (r"^patch_embed\.(conv)?(\d)\.", _fast_stem_layer),
    (r"^blocks(\d)\.(\d+)\.", _fast_block),
    (r"\.downsample\.res1\.", ".downsample."),
    (r"\.downsample\.patchmerge\.", ".downsample.2."),
    *children(r"\.downsample\.res2", ".downsample.3", ".downsample.4"),
)
# Of their layers, after these. A second head is for distillation.
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
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    _HEAD,
)
