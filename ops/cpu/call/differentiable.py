"""Gradients of kernels, by other kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.binding import Kernel, registered
from ops.cpu.call.dispatch import is_plain_call, needs_grad


def differentiable(
    kernel: Kernel, gradients: Callable[..., Sequence[Tensor | None]]
) -> Callable[..., Any]:
    """A function that calls ``kernel`` and, where autograd records, also has gradients.

    So has the kernel's operator, for ``torch.compile`` and calls of the operator itself.

    Args:
        kernel: gives one tensor, or several. Its tensor arguments come first.
        gradients: maps the gradient of the result and the kernel's arguments to the gradients of
            its tensors in order, in any dtype. It must not change the arguments. For several
            results, it gets their gradients, some of which may be None, and the results.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                out = kernel(*inputs)
            results, tensors = () if isinstance(out, Tensor) else out, _tensors(inputs)
            ctx.save_for_backward(*results, *tensors)
            ctx.results, ctx.others = len(results), inputs[len(tensors) :]
            ctx.set_materialize_grads(not results)
            return out

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads_out: Tensor | None) -> tuple[Any, ...]:
            saved = ctx.saved_tensors  # once: a checkpoint computes them for one reader
            tensors = saved[ctx.results :]
            grads = gradients(*grads_out, *saved, *ctx.others)
            wanted = (
                grad.to(tensor.dtype) if need and grad is not None else None
                for grad, tensor, need in zip(grads, tensors, ctx.needs_input_grad, strict=False)
            )
            return (*wanted, *(None for _ in ctx.others))

    @torch.library.impl(registered, kernel.name, "AutogradCPU")
    def with_gradients(*inputs: Any) -> Any:
        if needs_grad(_tensors(inputs)):
            return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*inputs)

    def call(*inputs: Any) -> Any:
        tensors = _tensors(inputs)
        plain = needs_grad(tensors) and is_plain_call(tensors)
        return (with_gradients if plain else kernel)(*inputs)

    return call


def _tensors(inputs: Sequence[Any]) -> list[Tensor | None]:
    return [t for t in inputs if t is None or isinstance(t, Tensor)]
