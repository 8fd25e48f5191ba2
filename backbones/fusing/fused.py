"""Classes of fused networks, which replay calls and reject what they cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backbones.fusing.int8_state import Int8Model
from ops.inference.layers import plain_forms
from ops.rewriting.module import Rewritten

__all__ = ["FusedBackbone", "FusedNetwork", "has_hooks", "named_briefly", "require_evaluation"]


class FusedNetwork(Int8Model, Rewritten):
    """A fused network of another package; its layers are unchanged."""

    def train(self, mode: bool = True) -> Any:
        """Like ``nn.Module.train``; raises, since replays are for evaluation."""
        require_evaluation(self, mode)
        return super().train(mode)


def require_evaluation(model: nn.Module, mode: bool) -> None:
    """Raise a RuntimeError if a fused model is to be trained."""
    if mode:
        raise RuntimeError(
            f"{type(model).__name__} has been fused for inference and cannot be trained; "
            "create the model again, or keep a copy.deepcopy from before fuse()"
        )


class FusedBackbone(Rewritten):
    """Rejects inputs and modifications that a fused model's layers would silently get wrong."""

    def program(self, x: Tensor, call: Callable[[Tensor], Any]) -> Any:
        _require_images(x, self)
        return super().program(x, call)

    def eagerly(self, method: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the images and the model, then call ``method``.

        Raises:
            TypeError: not a tensor.
            ValueError: an image of another shape, dtype or device than the layers take.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
            return method(self, x, *args, **kwargs)  # symbolic values
        with torch._C.DisableTorchFunction():  # hide this from a capture
            _require_images(x, self)
            gradients = torch.is_grad_enabled() and x.requires_grad
            is_meta = x.is_meta
        if is_meta or not any(has_hooks(m, gradients) for m in self.modules() if m is not self):
            return method(self, x, *args, **kwargs)
        with plain_forms():
            return method(self, x, *args, **kwargs)


def named_briefly(names: list[str]) -> str:
    """The first name, and how many others there are."""
    others = {0: "", 1: " and another module"}
    return names[0] + others.get(len(names) - 1, f" and {len(names) - 1} other modules")


def has_hooks(module: nn.Module, gradients: bool = True) -> bool:
    """Whether a module has hooks of its forward or, with ``gradients``, its backward pass."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return gradients and bool(module._backward_hooks or module._backward_pre_hooks)


def _require_images(x: Any, model: Any) -> None:
    weight, chans = next(model.parameters()), model.in_chans
    expected = (
        f"{type(model).__name__} expects images (B, {chans}, H, W) of {weight.dtype} "
        f"on {weight.device}"
    )
    if not isinstance(x, Tensor):
        raise TypeError(f"{expected}, got a {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "nested tensor" if x.is_nested else f"tensor of layout {x.layout}"
        raise ValueError(f"{expected}, got a {kind}")
    if weight.is_meta:
        return
    dtype, channels = x.dtype, (chans, chans)
    if model.centres_images:
        dtype, channels = torch.promote_types(dtype, weight.dtype), (1, chans)
    fits = x.ndim == 4 and x.shape[1] in channels and 0 not in x.shape[2:]
    fits &= dtype == weight.dtype or torch.is_autocast_enabled(weight.device.type)
    if not fits or x.device != weight.device:
        raise ValueError(f"{expected}, got {tuple(x.shape)} of {x.dtype} on {x.device}")
