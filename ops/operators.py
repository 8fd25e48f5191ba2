"""Operators of torch whose gradients are computed by another operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def operator_with_gradients(
    name: str,
    parameters: str,
    forward: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]],
    like: Callable[..., Any],
    results: int = 1,
) -> Callable[..., Any]:
    """Register an operator, and ``{name}_backward`` for its gradients.

    Args:
        name: of the operator, in the namespace ``vision_backbones``.
        parameters: as in a schema, tensors first.
        forward: computes the result from the inputs.
        backward: computes the gradients of the tensors in order, in any dtype, from that of the
            result and the inputs. Those of absent tensors are None. With several results, it gets
            their gradients, the results, the inputs, and, by the name ``needed``, whether each
            tensor's gradient is used; those that are not may be None.
        like: the result for fake inputs.
        results: how many tensors the operator returns, one or two.
    """
    count, is_one = parameters.count("Tensor"), results == 1
    saved = [] if is_one else [f"Tensor out{i}" for i in range(results)]
    of_backward = [*(f"Tensor grad{i}" for i in range(results)), *saved, parameters]

    def gradients(*given: Any) -> list[Tensor]:
        *inputs, needed = given
        tensors = inputs[results + len(saved) :][:count]
        grads = backward(*inputs) if is_one else backward(*inputs, needed=needed)
        found = zip(grads, tensors, needed, strict=True)
        return [grad.to(t.dtype) for grad, t, need in found if need and grad is not None]

    operator = torch.library.custom_op(
        f"vision_backbones::{name}",
        forward,
        mutates_args=(),
        schema=f"({parameters}) -> {'Tensor' if is_one else '(Tensor, Tensor)'}",
    )
    operator.register_fake(like)
    operator_of_gradients = torch.library.custom_op(
        f"vision_backbones::{name}_backward",
        gradients,
        mutates_args=(),
        schema=f"({', '.join(of_backward)}, bool[] needed) -> Tensor[]",
    )

    @operator_of_gradients.register_fake
    def _(*given: Any) -> list[Tensor]:
        tensors = given[results + len(saved) :][:count]
        return [t.new_empty(t.shape) for t, need in zip(tensors, given[-1], strict=True) if need]

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(() if is_one else output), *inputs[:count])
        ctx.others = inputs[count:]

    def differentiate(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:count])
        grads = operator_of_gradients(*grads_out, *ctx.saved_tensors, *ctx.others, needed)
        found = iter(grads)
        return *(next(found) if need else None for need in needed), *(None for _ in ctx.others)

    operator.register_autograd(differentiate, setup_context=set_up)
    return operator
