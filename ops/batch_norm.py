"""Batch norm with correct gradients on a CPU for a batch of one, which torch's lacks.

A dimension of size 1 may have any stride, and a channels-last map made from tokens
(``tokens.transpose(1, 2).unflatten(2, (H, W))`` of one image) has strides (C, 1, W·C, C) instead
of (H·W·C, 1, W·C, C). torch considers such a map dense in channels-last format, but infers from its
strides that channels come first. The backward pass of its CPU batch norm relies on that inference
and reads gradient and input in the same order although their layouts differ, so that the gradients
of the input and of both parameters are those of shuffled pixels. This was observed in torch 2.7,
2.8, 2.13, 2.14 and 2.15, in eval and train mode, in every dtype; ``vision-backbones doctor`` tests
for it.
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
    """``x``, or a view with the usual channels-last strides if it is in that format.

    Args:
        x: (B, C, H, W) in any memory format.

    Returns:
        (B, C, H, W), sharing memory with ``x``.
    """
    # Without dimensions of size 1, channels-last strides are unique.
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
    """Gradient hook. Returning None keeps the gradient; torch passes None if there is none."""
    return None if grad is None or grad.is_contiguous() else with_canonical_strides(grad)


def _with_canonical_gradient(x: Tensor) -> Tensor:
    """``x`` through views whose derivatives have the effect of the hook.

    In the backward pass, each dimension of size 1 gets its stride from the next inner one in
    channels-last order.
    """
    x = x.permute(0, 2, 3, 1)
    for axis in range(3):
        if x.shape[axis] == 1:
            x = x.squeeze(axis).unsqueeze(axis)
    return x.permute(0, 3, 1, 2)


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with correct gradients for a batch of one.

    (B, num_features, H, W) → (B, num_features, H, W). Arguments, state and outputs are those of
    ``nn.BatchNorm2d``. Without gradients, and on devices other than CPUs, it is the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return self._symbolically(input)
        if (
            not (torch.is_grad_enabled() and input.is_cpu)
            or torch.compiler._is_exporting_flag  # torch 2.8 compiles is_exporting() to True
            or torch.jit.is_tracing()
            or 1 not in input.shape
        ):
            return super().forward(input)
        out = super().forward(with_canonical_strides(input))
        if not (out.requires_grad and out.is_contiguous()):
            return out
        if torch.compiler.is_compiling():
            # Compilers can't trace a hook that reads strides, and views are free for them.
            return _with_canonical_gradient(out)
        out.register_hook(_canonical_gradient)
        return out

    def _symbolically(self, input: Proxy) -> Any:
        """A single node in torch.fx, which otherwise traces into modules that aren't torch's."""
        tracer: Any = input.tracer
        path = tracer.path_of_module(self)
        return tracer.create_proxy("call_module", path, (input,), {})


def has_wrong_gradients() -> bool:
    """Whether this version of torch has the bug described above; takes a millisecond."""
    x = torch.arange(8.0).view(1, 2, 2, 2).requires_grad_()
    grad = torch.arange(8.0).view(1, 4, 2).transpose(1, 2).unflatten(2, (2, 2))
    out = nn.BatchNorm2d(2).eval()(x)
    given, wanted = (
        torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in (grad, grad.contiguous())
    )
    return not torch.allclose(given, wanted)
