"""Inference form of stems: consecutive 3×3 convolutions of stride 2."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.stem.packed_stem import pack_layers, packed_stem
from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer, activation_kind, tensors_of

__all__ = ["FastStem", "is_stem"]


def is_stem(module: nn.Module) -> bool:
    """Whether a module is a sequence of at least two convolutions that :class:`FastStem` supports.

    Each may be followed by a :class:`timm.layers.LayerNorm2d` and an activation.
    """
    if type(module) is not nn.Sequential:
        return False
    convs, before = 0, None
    for layer in _leaves(module):
        if _is_conv(layer):
            convs += 1
        elif type(layer) is LayerNorm2d:
            if not isinstance(before, nn.Conv2d) or layer.weight is None or layer.bias is None:
                return False
        elif activation_kind(layer) is None or not isinstance(before, nn.Conv2d | LayerNorm2d):
            return False
        before = layer
    return convs > 1


def _leaves(module: nn.Module) -> list[nn.Module]:
    """The layers of nested sequences, without identities."""
    if isinstance(module, nn.Sequential):
        return [leaf for child in module for leaf in _leaves(child)]
    return [] if isinstance(module, nn.Identity) else [module]


def _is_conv(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or module.groups != 1 or module.padding_mode != "zeros":
        return False
    shape = (module.kernel_size, module.stride, module.padding, module.dilation)
    return shape == ((3, 3), (2, 2), (1, 1), (1, 1))


@stands_for(nn.Sequential, where=is_stem)
class FastStem(FastLayer, nn.Sequential):
    """Runs in one pass, see :func:`packed_stem`, including the activations."""

    def forward(self, x: Tensor) -> Tensor:
        derived = self.derived(x)
        if derived is None:
            return super().forward(x)
        dtype, *packed = derived
        return packed_stem(x.to(dtype), *packed).to(x.dtype)

    def sources(self) -> list[Tensor]:
        return tensors_of(*(leaf for leaf in _leaves(self) if hasattr(leaf, "weight")))

    def derive(self, x: Tensor) -> Any:
        dtype = policy.computed_in(x.dtype)
        if packed_stem.unsupported(x.device, dtype) is not None:
            return None
        layers: list[Any] = []  # convolutions, their norms or nothing, and activations
        for layer in _leaves(self):
            if isinstance(layer, LayerNorm2d):
                layers[-1] = (layers[-1][0], layer, "none")
            elif isinstance(layer, nn.Conv2d):
                layers.append((layer, None, "none"))
            else:
                layers[-1] = (*layers[-1][:2], activation_kind(layer))
        odd = any(conv.in_channels % 2 for conv, *_ in layers[1:])  # which have no pairs
        if not policy.stem_by_kernel(odd, dtype):
            return None
        convs, layer_norms, activations = zip(*layers, strict=True)
        packed = pack_layers(convs, dtype)
        if not any(layer_norms):
            return dtype, *packed, list(activations)
        norms = [
            x.new_empty(0, dtype=torch.float32)
            if norm is None
            else torch.stack((norm.weight, norm.bias)).float()
            for norm in layer_norms
        ]
        eps = [0.0 if norm is None else norm.eps for norm in layer_norms]
        return dtype, *packed, list(activations), norms, eps
