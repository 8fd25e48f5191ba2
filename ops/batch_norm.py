"""Batch norm whose gradients are right on a CPU for a batch of one, where torch's are not.

A dimension of size 1 may have any stride, and a map with channels last that comes from tokens
(``tokens.transpose(1, 2).unflatten(2, (H, W))`` of one image) has strides (C, 1, W·C, C) instead
of (H·W·C, 1, W·C, C). torch calls such a map dense with channels last, yet guesses from its strides
that its channels come first. The backward pass of its batch norm on CPUs compares those guesses,
and then reads gradient and input in one order, though they have two: the gradients of the input
and of both parameters are those of shuffled pixels. This was seen in torch 2.7, 2.8, 2.13, 2.14 and
2.15, in eval and in train mode, in every dtype; ``vision-backbones doctor`` looks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ops.arguments import checked

__all__ = ["BatchNorm2d", "has_wrong_gradients", "with_canonical_strides"]


@checked()
def with_canonical_strides(x: Tensor) -> Tensor:
    """``x``, or a view of it whose strides say that its channels are last, if they are.

    Args:
        x: (B, C, H, W) in any memory format.

    Returns:
        (B, C, H, W), the same values in the same memory: nothing is copied.
    """
    # Without a dimension of size 1 there is only one way to have channels last.
    if x.ndim != 4 or 1 not in x.shape or x.is_contiguous():
        return x
    _, channels, height, width = x.shape
    canonical = (height * width * channels, 1, width * channels, channels)
    strides = x.stride()
    if strides == canonical or any(
        size > 1 and stride != wanted
        for size, stride, wanted in zip(x.shape, strides, canonical, strict=True)
    ):
        return x
    return x.as_strided(x.shape, canonical)


def _canonical_gradient(grad: Tensor | None) -> Tensor | None:
    """A hook: None leaves the gradient as it is, and is what torch gives where there is none."""
    return None if grad is None or grad.is_contiguous() else with_canonical_strides(grad)


def _with_canonical_gradient(x: Tensor) -> Tensor:
    """``x`` behind views whose derivatives do what the hook does.

    Backwards, each dimension of size 1 gets its stride from the one behind it, in the order of
    channels last.
    """
    x = x.permute(0, 2, 3, 1)
    for axis in range(3):
        if x.shape[axis] == 1:
            x = x.squeeze(axis).unsqueeze(axis)
    return x.permute(0, 3, 1, 2)


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the right gradients for a batch of one, too.

    (B, num_features, H, W) → (B, num_features, H, W). Arguments, state and outputs are those of
    ``nn.BatchNorm2d``. Without gradients, and on other devices than a CPU, it is nothing else.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return self._symbolically(input)
        if (
            not (torch.is_grad_enabled() and input.is_cpu)
            or torch.compiler.is_exporting()
            or torch.jit.is_tracing()
            or 1 not in input.shape
        ):
            return super().forward(input)
        out = super().forward(with_canonical_strides(input))
        if not (out.requires_grad and out.is_contiguous()):
            return out
        if torch.compiler.is_compiling():
            # Compilers trace no hook that looks at strides, and views cost them nothing.
            return _with_canonical_gradient(out)
        out.register_hook(_canonical_gradient)
        return out

    def _symbolically(self, input: Proxy) -> Any:
        """One node of torch.fx, which looks into all layers that are not torch's own."""
        tracer: Any = input.tracer
        path = tracer.path_of_module(self)
        return tracer.create_proxy("call_module", path, (input,), {})


def has_wrong_gradients() -> bool:
    """Whether this torch has the fault that this module is there for; takes a millisecond."""
    x = torch.arange(8.0).view(1, 2, 2, 2).requires_grad_()
    grad = torch.arange(8.0).view(1, 4, 2).transpose(1, 2).unflatten(2, (2, 2))
    out = nn.BatchNorm2d(2).eval()(x)
    given, wanted = (
        torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in (grad, grad.contiguous())
    )
    return not torch.allclose(given, wanted)
