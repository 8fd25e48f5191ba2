"""Checks of fused models: unsupported images, and hooks that are not called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ops.inference.forms import plain_form
from ops.rewriting.module import Rewritten

__all__ = ["FusedBackbone", "has_hooks", "named_briefly"]


class FusedBackbone(Rewritten):
    """Rejects inputs and modifications that a fused model's layers would silently get wrong."""

    def eagerly(self, method: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the images and the model, then call ``method``.

        Raises:
            TypeError: not a tensor.
            ValueError: an image of another shape, dtype or device than the layers take.
            RuntimeError: a layer has hooks that this call did not call.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
            return method(self, x, *args, **kwargs)  # symbolic values
        with torch._C.DisableTorchFunction():  # hide this from a capture
            _require_images(x, self)
            gradients = torch.is_grad_enabled() and x.requires_grad
            is_meta = x.is_meta
        hooked = any(
            has_hooks(module, gradients) for module in self.modules() if module is not self
        )
        if is_meta or not hooked:
            return method(self, x, *args, **kwargs)
        with self._calling_hooks(gradients):
            return method(self, x, *args, **kwargs)

    @contextmanager
    def _calling_hooks(self, gradients: bool) -> Iterator[None]:
        """Raise a RuntimeError if a fused layer has run without calling the hooks inside it."""
        modules = dict(self.named_modules())
        around: dict[str, str] = {}  # the fused layer that each module with hooks is in
        for name, module in modules.items():
            if not has_hooks(module, gradients):
                continue
            outer = [o for o in _outer_names(name) if plain_form(modules[o]) is not None]
            if outer:
                around[name] = outer[0]
        called: set[str] = set()
        with ExitStack() as hooks:
            for name in {*around, *around.values()}:

                def enter(*_: Any, name: str = name) -> None:
                    called.add(name)

                hooks.callback(modules[name].register_forward_pre_hook(enter).remove)
            yield
        silent = [name for name, form in around.items() if form in called and name not in called]
        if silent:
            form = around[silent[0]]
            raise RuntimeError(
                f"hooks of {named_briefly(silent)} are not called, since the fused {form} does not "
                f"call it as a module; register them on {form}, or on a model without fuse()"
            )


def named_briefly(names: list[str]) -> str:
    """The first name, and how many others there are."""
    others = {0: "", 1: " and another module"}
    return names[0] + others.get(len(names) - 1, f" and {len(names) - 1} other modules")


def _outer_names(name: str) -> list[str]:
    """The names of the modules that a module is in, from the outermost one."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def has_hooks(module: nn.Module, gradients: bool = True) -> bool:
    """Whether a module has hooks of its forward or, with ``gradients``, its backward pass."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return gradients and bool(module._backward_hooks or module._backward_pre_hooks)


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
