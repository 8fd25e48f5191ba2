"""Fast CPU training of attention with a trainable bias.

On a CPU, torch's fused kernels don't compute the bias gradient, and its unfused implementation
reads and writes the scores of all windows at each step. Here, windows are processed one at a time,
so that a window's scores stay in cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.arguments import checked

__all__ = ["attend_in_turn", "worth_a_turn"]

# Minimum size of a window's scores; below it, call overhead dominates.
_SCORE_BYTES = 1 << 19


@checked(ranks={"q": 4, "k": 4, "v": 4, "bias": 3})
def worth_a_turn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """Whether :func:`attend_in_turn` supports these tensors (of the same shapes) and is faster.

    It is not used under compilation, which has its own fusion, or autocast, which mixes dtypes.
    """
    return (
        q.is_cpu
        and bias.requires_grad
        and torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not torch.is_autocast_enabled("cpu")
        and q.dtype == k.dtype == v.dtype == bias.dtype
        and bias.numel() * bias.element_size() >= _SCORE_BYTES
    )


@checked(ranks={"q": 4, "k": 4, "v": 4, "bias": 3})
def attend_in_turn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, masks: Sequence[Tensor | None]
) -> Tensor:
    """``softmax(q kᵀ / √head_dim + bias + mask) v`` for each window.

    Differentiable with respect to everything except the masks.

    Args:
        q: (windows, heads, N, head_dim).
        k: (windows, heads, M, head_dim).
        v: (windows, heads, M, head_dim).
        bias: (heads, N, M).
        masks: for each window (N, M), or None.

    Returns:
        (windows, heads, N, head_dim).
    """
    out: Tensor = _BiasedAttention.apply(q, k, v, bias, masks)
    return out


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, masks: Sequence[Tensor | None]
    ) -> Tensor:
        ctx.scale, ctx.masks = q.shape[-1] ** -0.5, masks
        weights, out = q.new_empty(len(q), *bias.shape), q.new_empty(q.shape)
        for window, mask in enumerate(masks):
            scores = torch.baddbmm(bias, q[window], k[window].transpose(1, 2), alpha=ctx.scale)
            if mask is not None:
                scores += mask
            torch.softmax(scores, -1, out=weights[window])
            torch.bmm(weights[window], v[window], out=out[window])
        ctx.save_for_backward(q, k, v, bias, weights)
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is required
            none = bias.new_zeros(bias.shape[1:])
            masks = torch.stack([none if mask is None else mask for mask in ctx.masks])
            scores = ctx.scale * q @ k.transpose(2, 3) + bias + masks.unsqueeze(1)
            out = scores.softmax(-1) @ v
            return *torch.autograd.grad(out, (q, k, v, bias), out_grad, create_graph=True), None
        grads = [t.new_empty(t.shape) for t in (q, k, v)]
        bias_grad = torch.zeros_like(bias)
        for window in range(len(q)):
            q_grad, k_grad, v_grad = (grad[window] for grad in grads)
            p, grad = weights[window], out_grad[window]
            torch.bmm(p.transpose(1, 2), grad, out=v_grad)
            slopes = torch.bmm(grad, v[window].transpose(1, 2))
            slopes = torch._softmax_backward_data(slopes, p, -1, p.dtype)
            bias_grad += slopes
            slopes *= ctx.scale
            torch.bmm(slopes, k[window], out=q_grad)
            torch.bmm(slopes.transpose(1, 2), q[window], out=k_grad)
        return *grads, bias_grad, None
