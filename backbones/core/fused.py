"""Checks of fused models: unsupported images and replaced layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ops.inference.forms import plain_form
from ops.inference.layers import AbsorbedActivation
from ops.replay.module import Recorded

__all__ = ["FusedBackbone"]


class FusedBackbone(Recorded):
    """Rejects inputs and modifications that a fused model's layers would silently get wrong."""

    _parts: tuple[list[nn.Module], list[nn.Module | None]] | None = None

    def compute(self, x: Tensor) -> Tensor:
        self._check(x)
        return super().compute(x)

    def forward_features(self, x: Tensor) -> Any:
        self._check(x)
        return super().forward_features(x)  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check(x)
        return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]

    def remember_parts(self) -> None:
        """Remember the layers that were fused: those of the stages, and others with a form."""
        stages: Any = self.stages
        within = {m for stage in stages for m in stage.modules()}
        parents = [m for m in self.modules() if m is not self and (m in within or _is_fused(m))]
        self._parts = parents, _children_of(parents)

    def _check(self, x: Any) -> None:
        """Reject unsupported images and replaced layers.

        Raises:
            TypeError: not a tensor.
            ValueError: an image of another shape, dtype or device than the layers take.
            RuntimeError: a layer has been replaced.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
            return  # symbolic values
        with torch._C.DisableTorchFunction():  # hide this from a capture
            _require_images(x, self)
        if self._parts is not None and _children_of(self._parts[0]) != self._parts[1]:
            raise RuntimeError(
                f"a layer inside the {type(self).__name__} was replaced after fuse() had combined "
                "it with its neighbours; call fuse() again"
            )


def _children_of(modules: list[nn.Module]) -> list[nn.Module | None]:
    return [child for m in modules for child in m._modules.values()]


def _is_fused(module: nn.Module) -> bool:
    absorbed = AbsorbedActivation
    return plain_form(module) is not None or any(type(m) is absorbed for m in module.children())


def _require_images(x: Any, model: Any) -> None:
    weight, chans = next(model.parameters()), model.in_chans
    expected = (
        f"{type(model).__name__} takes images (B, {chans}, H, W) of {weight.dtype} "
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
