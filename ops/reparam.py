"""Structural re-parameterisation: fold linear operations into adjacent layers for inference.

A layer supports it by a method ``fuse() -> nn.Module``, which returns its replacement (itself, if
modified in place) and can be called again. :func:`fuse_children` applies it to a whole network,
like timm's ``reparameterize_model``. Folding creates new layers and leaves the originals unchanged.
The idea is that of RepVGG, https://arxiv.org/abs/2101.03697.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ops.arguments import checked

__all__ = [
    "fold_norm_after",
    "fold_norm_before",
    "fold_scale_after",
    "fuse_children",
    "norm_affine",
]

Weighted = TypeVar("Weighted", nn.Conv2d, nn.Linear)


@checked()
def norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Per-channel ``(scale, shift)``, each (C,), of a batch norm in eval mode."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale, shift


def _new_layer(layer: Weighted, weight: Tensor, bias: Tensor | None) -> Weighted:
    """A copy of ``layer`` with the given weight and bias."""
    folded = copy.copy(layer)
    folded._parameters = {}
    trains = layer.weight.requires_grad
    for name, value in (("weight", weight), ("bias", bias)):
        parameter = None if value is None else nn.Parameter(value, requires_grad=trains)
        folded.register_parameter(name, parameter)
    return folded


@checked()
@torch.no_grad()
def fold_scale_after(layer: Weighted, scale: Tensor, shift: Tensor | None = None) -> Weighted:
    """A new layer that computes ``layer(x) * scale + shift`` (both (C_out,))."""
    weight = layer.weight * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    bias = None if layer.bias is None else layer.bias * scale
    if shift is not None:
        bias = shift.clone() if bias is None else bias + shift
    return _new_layer(layer, weight, bias)


@checked()
@torch.no_grad()
def fold_norm_after(layer: Weighted, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Weighted:
    """A new layer that computes ``norm(layer(x))``."""
    return fold_scale_after(layer, *norm_affine(norm))


@checked()
@torch.no_grad()
def fold_norm_before(norm: nn.BatchNorm1d | nn.BatchNorm2d, layer: Weighted) -> Weighted:
    """A new layer that computes ``layer(norm(x))``.

    Raises:
        ValueError: a convolution with padding or groups, for which folding would not be exact.
    """
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or any(map(bool, layer.padding))):
        raise ValueError(
            f"a norm cannot be folded into a convolution with padding or groups: {layer}"
        )
    scale, shift = norm_affine(norm)
    taps = layer.weight.flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight
    bias = taps @ shift
    if layer.bias is not None:
        bias = bias + layer.bias
    weight = layer.weight * scale.view(1, -1, *[1] * (layer.weight.ndim - 2))
    return _new_layer(layer, weight, bias)


@checked()
def fuse_children(module: nn.Module) -> None:
    """Replace every descendant that has ``fuse()`` by its result, from the top down."""
    for name, child in list(module.named_children()):
        fuse = getattr(child, "fuse", None)
        if callable(fuse):
            child = fuse()
            setattr(module, name, child)
        fuse_children(child)
