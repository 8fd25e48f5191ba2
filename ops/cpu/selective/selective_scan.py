"""Selective scan on the CPU, see :mod:`ops.selective_scan`.

Of sequences (``sequences.h``) and of a map in four orders (``map.h``), forward (``forward.h``) and
backward (``backward.h``). Steps, decays, states and sums are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import dense_channels
from ops.cpu.threads import VALUES, threads_for

_PART = 128  # as in backward.h


@kernel("selective_scan", "selective_scan_sequences", large_results=True)
def sequence_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Call:
    """The scan; shapes as in :func:`ops.selective_scan.selective_scan`. No gradients.

    A, D and delta_bias are float32, the others in the dtype of u.
    """
    require_dtype(torch.float32, A=A, D=D, delta_bias=delta_bias)
    require_dtype(u.dtype, delta=delta, B=B, C=C)

    def arguments() -> dict[str, Any]:
        return {
            **_sizes(len(u), u.shape[2], B.shape[1], A, softplus),
            **_sequences(u, delta, B, C),
            **_channels(A, D, delta_bias),
        }

    return Call(u.new_empty(u.shape), arguments)


@kernel("selective_scan", "selective_scan_sequences_backward", returns=7, large_results=True)
def sequence_scan_backward(
    grad_out: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Call:
    """Gradients of :func:`sequence_scan`, in float32 and contiguous.

    Those of A, D and delta_bias come apart by image, in a leading axis, and those of B and C by
    part of a group's channels. Those of absent parameters are given, too.
    """
    require_dtype(torch.float32, A=A, D=D, delta_bias=delta_bias)
    require_dtype(u.dtype, delta=delta, B=B, C=C, grad_out=grad_out)
    groups, of_channels = B.shape[1], (len(u), len(A))
    of_shared = (_parts(len(A) // groups), *B.shape)
    grads = _empty(
        *(u, u.shape, u.shape, (len(u), *A.shape), of_shared, of_shared),
        *(of_channels, of_channels),
    )

    def arguments() -> dict[str, Any]:
        names = ("u", "delta", "decay", "before", "after", "own", "bias")
        return {
            **_sizes(len(u), u.shape[2], groups, A, softplus),
            **_sequences(u, delta, B, C),
            **_channels(A, D, delta_bias),
            **{f"grad_{name}": t for name, t in zip(names, grads, strict=True)},
            "grad_out": _rows(grad_out, groups),
        }

    return Call(grads, arguments)


@kernel("selective_scan", "selective_scan_map", large_results=True)
def map_scan(
    x: Tensor,
    projected: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Call:
    """The scan of a map in four orders, and its sum. No gradients.

    Shapes as in :func:`ops.selective_scan.cross_selective_scan`, but for ``weight``: (4, R, P).

    Parameters are float32, maps of one dtype.
    """
    require_dtype(torch.float32, weight=weight, A=A, D=D, delta_bias=delta_bias)
    require_dtype(x.dtype, projected=projected)

    def arguments() -> dict[str, Any]:
        return {**_map_sizes(x, weight, A, softplus), **_channels(A, D, delta_bias)}

    return Call(x.new_empty(x.shape), arguments)


@kernel("selective_scan", "selective_scan_map_backward", returns=6, large_results=True)
def map_scan_backward(
    grad_out: Tensor,
    x: Tensor,
    projected: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
) -> Call:
    """Gradients of :func:`map_scan`, in float32 and contiguous.

    Those of the parameters come apart by image, in a leading axis, and that of ``projected`` by
    part of the channels. Those of absent parameters are given, too.
    """
    require_dtype(torch.float32, weight=weight, A=A, D=D, delta_bias=delta_bias)
    require_dtype(x.dtype, projected=projected, grad_out=grad_out)
    of_channels = (len(x), len(A))
    grads = _empty(
        *(x, x.shape, (_parts(x.shape[3]), *projected.shape), (len(x), *weight.shape)),
        *((len(x), *A.shape), of_channels, of_channels),
    )

    def arguments() -> dict[str, Any]:
        names = ("in", "projected", "weight", "decay", "own", "bias")
        return {
            **_map_sizes(x, weight, A, softplus),
            **_channels(A, D, delta_bias),
            **{f"grad_{name}": t for name, t in zip(names, grads, strict=True)},
        }

    return Call(grads, arguments)


def _parts(channels: int) -> int:
    return -(-channels // _PART)


def _empty(like: Tensor, *shapes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _sequences(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> dict[str, Any]:
    groups = B.shape[1]
    of_channels = {"u": _rows(u, groups), "delta": _rows(delta, groups)}
    return {**of_channels, "before": _rows(B), "after": _rows(C)}


def _channels(A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> dict[str, Any]:
    named = {"decay": A, "own": D, "bias": delta_bias}
    return {name: None if t is None else t.contiguous() for name, t in named.items()}


def _rows(t: Tensor, groups: int | None = None) -> dict[str, Any]:
    """(B, G, rows, L), or (B, G · rows, L) with the number of groups; L is made dense."""
    t = dense_channels(t)
    batch, *steps, _ = t.stride()
    group, row = steps if groups is None else (t.shape[1] // groups * steps[0], steps[0])
    return {"data": t, "batch": batch, "group": group, "row": row}


def _sizes(batch: int, tokens: int, groups: int, A: Tensor, softplus: bool) -> dict[str, int]:
    return {
        **{"batch": batch, "tokens": tokens, "groups": groups, "dim": len(A) // groups},
        **{"states": A.shape[1], "softplus": softplus},
        # An exponential for every state.
        "threads": threads_for(4 * batch * tokens * A.numel(), VALUES),
    }


def _map_sizes(x: Tensor, weight: Tensor, A: Tensor, softplus: bool) -> dict[str, int]:
    batch, height, width, _ = x.shape
    return {
        **_sizes(batch, height * width, len(weight), A, softplus),
        **{"height": height, "width": width, "rank": weight.shape[1]},
    }
