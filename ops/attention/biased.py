"""Attention with a trained term added to its scores, as a CPU trains it quickest.

No kernel of torch's gives a gradient of the term there, and its plain form reads and writes the
scores of all windows from one step to the next. Here a window's scores go through all steps while
they lie in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["attend_in_turn", "worth_a_turn"]

# Of a window's scores; those of smaller windows take longer to call than to compute.
_SCORE_BYTES = 1 << 19


def worth_a_turn(q: Tensor, k: Tensor, v: Tensor, terms: Tensor) -> bool:
    """Whether :func:`attend_in_turn` can train these, and is the quicker way.

    Shapes: as there. Compilers have ways of their own, and autocast mixes dtypes.
    """
    return (
        q.is_cpu
        and terms.requires_grad
        and torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not torch.is_autocast_enabled("cpu")
        and q.dtype == k.dtype == v.dtype == terms.dtype
        and terms[0].numel() * terms.element_size() >= _SCORE_BYTES
    )


def attend_in_turn(q: Tensor, k: Tensor, v: Tensor, terms: Tensor, kinds: Sequence[int]) -> Tensor:
    """``softmax(q kᵀ + terms[kind]) v`` for each window, with gradients of all of them.

    Args:
        q: (windows, heads, N, head_dim), scaled.
        k: (windows, heads, M, head_dim).
        v: (windows, heads, M, head_dim).
        terms: (kinds, heads, N, M).
        kinds: which of the terms each window is added.

    Returns:
        (windows, heads, N, head_dim).
    """
    out: Tensor = _InTurn.apply(q.contiguous(), k.contiguous(), v.contiguous(), terms, kinds)
    return out


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, terms: Tensor, kinds: Sequence[int]
    ) -> Tensor:
        weights, out = q.new_empty(len(q), *terms.shape[1:]), torch.empty_like(q)
        for window, kind in enumerate(kinds):
            scores = torch.bmm(q[window], k[window].transpose(1, 2)).add_(terms[kind])
            torch.softmax(scores, -1, out=weights[window])
            torch.bmm(weights[window], v[window], out=out[window])
        ctx.save_for_backward(q, k, v, terms, weights)
        ctx.kinds = kinds
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, terms, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone wants the gradient of a gradient
            out = (q @ k.transpose(2, 3) + terms[list(ctx.kinds)]).softmax(-1) @ v
            return *torch.autograd.grad(out, (q, k, v, terms), out_grad, create_graph=True), None
        out_grad = out_grad.contiguous()
        grads = [torch.empty_like(t) for t in (q, k, v)]
        terms_grad = torch.zeros_like(terms)
        for window, kind in enumerate(ctx.kinds):
            q_grad, k_grad, v_grad = (grad[window] for grad in grads)
            p, grad = weights[window], out_grad[window]
            torch.bmm(p.transpose(1, 2), grad, out=v_grad)
            slopes = torch.bmm(grad, v[window].transpose(1, 2))
            slopes = torch._softmax_backward_data(slopes, p, -1, p.dtype)
            terms_grad[kind] += slopes
            torch.bmm(slopes, k[window], out=q_grad)
            torch.bmm(slopes.transpose(1, 2), q[window], out=k_grad)
        return *grads, terms_grad, None
