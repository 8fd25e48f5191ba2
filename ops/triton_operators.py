"""Scans by Triton kernels as torch operators, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def operator_with_gradients(
    name: str,
    parameters: str,
    forward: Callable[..., Tensor],
    backward: Callable[..., Sequence[Tensor | None]],
    like: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """Register an operator, and ``{name}_backward`` for its gradients.

    Args:
        name: of the operator, in the namespace ``vision_backbones``.
        parameters: as in a schema, tensors first.
        forward: computes the result from the inputs.
        backward: computes the gradients of the tensors in order, in any dtype, from that of the
            result and the inputs. Those of absent tensors are None.
        like: the result for fake inputs.
    """
    count = parameters.count("Tensor")

    def gradients(grad_out: Tensor, *given: Any) -> list[Tensor]:
        grads = zip(backward(grad_out, *given), given[:count], strict=True)
        return [grad.to(t.dtype) for grad, t in grads if grad is not None]

    operator = torch.library.custom_op(
        f"vision_backbones::{name}",
        forward,
        mutates_args=(),
        schema=f"({parameters}) -> Tensor",
    )
    operator.register_fake(like)
    operator_of_gradients = torch.library.custom_op(
        f"vision_backbones::{name}_backward",
        gradients,
        mutates_args=(),
        schema=f"(Tensor grad_out, {parameters}) -> Tensor[]",
    )

    @operator_of_gradients.register_fake
    def _(grad_out: Tensor, *given: Any) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in given[:count] if t is not None]

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.others = inputs[count:]

    def differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads = iter(operator_of_gradients(grad_out, *tensors, *ctx.others))
        of_tensors = (None if t is None else next(grads) for t in tensors)
        return *of_tensors, *(None for _ in ctx.others)

    operator.register_autograd(differentiate, setup_context=set_up)
    return operator
