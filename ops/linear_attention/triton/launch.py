"""Launching the Triton kernels of gated linear attention."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ops.linear_attention.triton.kernels import backward_kernel, forward_kernel
from ops.operators import operator_with_gradients
from ops.triton_devices import LAUNCH_OPTIONS

_CHUNK = 16  # tokens between stored states
_MOST_CELLS = 2048  # largest state of a program, in elements


def _common(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    back: Tensor | None,
    apart: bool,
    scale: float,
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Arguments common to all kernels, and the grid."""
    batches, tokens, heads, dim = query.shape
    padded = max(16, triton.next_power_of_2(dim))
    block = min(max(16, triton.next_power_of_2(value.shape[-1])), max(16, _MOST_CELLS // padded))
    named = {"q": query, "k": key, "v": value, "gate": gate, "back": gate if back is None else back}
    arguments = {
        **{f"{name}_ptr": t for name, t in named.items()},
        **{f"{name}_strides": t.stride() for name, t in named.items()},
        **{"batches": batches, "tokens": tokens, "heads": heads, "scale": scale},
        **{"DIM": dim, "VALUE_DIM": value.shape[-1], "PADDED_DIM": padded, "BLOCK": block},
        **{"CHUNK": _CHUNK, "APART": apart},
    }
    directions = 1 if back is None else 2
    return arguments, (directions * batches * heads, triton.cdiv(value.shape[-1], block))


def _forward(*inputs: Any) -> Tensor:
    """The sum of the directions: (B, L, H, V) in float32."""
    common, grid = _common(*inputs)
    _, _, value, _, back, *_ = inputs
    directions = 1 if back is None else 2
    out = value.new_empty(directions, *value.shape, dtype=torch.float32)
    with torch.cuda.device_of(value):
        forward_kernel[grid](
            **common,
            **{"out_ptr": out, "grad_ptr": None, "grad_q_ptr": None, "states_ptr": None},
            **{"grad_strides": (0,) * 4, "FOR_BACKWARD": False},
            **LAUNCH_OPTIONS,
        )
    return out.sum(0)


def _backward(
    grad_out: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the five tensors in float32."""
    common, grid = _common(*inputs)
    query, _, value, _, back, *_ = inputs
    batches, tokens, heads, dim = query.shape
    directions = 1 if back is None else 2
    value_dim, blocks = value.shape[-1], grid[1]

    def empty(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    # Kernels always index two directions.
    of_keys = (blocks, 2, batches, tokens, heads, dim)
    grad_query, grad_key, grad_gate = (empty(*of_keys) for _ in range(3))
    grad_value = empty(directions, batches, tokens, heads, value_dim)
    states = empty(grid[0], triton.cdiv(tokens, _CHUNK), dim, value_dim)
    scratch = empty(grid[0], blocks, _CHUNK, common["PADDED_DIM"], common["BLOCK"])
    gradient = {"grad_ptr": grad_out, "grad_strides": grad_out.stride(), "states_ptr": states}
    with torch.cuda.device_of(query):
        forward_kernel[grid](
            **common,
            **gradient,
            **{"out_ptr": None, "grad_q_ptr": grad_query, "FOR_BACKWARD": True},
            **LAUNCH_OPTIONS,
        )
        backward_kernel[grid](
            **common,
            **gradient,
            **{"scratch_ptr": scratch, "grad_k_ptr": grad_key, "grad_v_ptr": grad_value},
            **{"grad_gate_ptr": grad_gate},
            **LAUNCH_OPTIONS,
        )
    of_query, of_key = (g[:, :directions].sum((0, 1)) for g in (grad_query, grad_key))
    of_gate = grad_gate[:, 0].sum(0)
    of_back = None if back is None else grad_gate[:, 1].sum(0)
    return of_query, of_key, grad_value.sum(0), of_gate, of_back


gated_scan = operator_with_gradients(
    "triton_gated_scan",
    "Tensor query, Tensor key, Tensor value, Tensor gate, Tensor? back, bool apart, float scale",
    _forward,
    _backward,
    lambda query, key, value, *others: value.new_empty(value.shape, dtype=torch.float32),
)
