"""Selective scan: the recurrence of Mamba's state space, and VMamba's scan of a map in four orders.

https://arxiv.org/abs/2312.00752; four orders: https://arxiv.org/abs/2401.10166.

:func:`selective_scan` scans sequences. A network calls
``cross_selective_scan(x, projected, delta_weight, A, D, delta_bias=…, delta_softplus=True)`` on its
NHWC map instead, which neither copies the map into four sequences nor expands the steps.
:func:`cross_scan` and :func:`cross_merge` make these sequences and sum them on their own.

Each backend, see :mod:`ops.backends`, is a module with these functions, which accept tensors of
float32 beside maps of lower precision:

``scan(inputs) -> out``
    :func:`selective_scan`, differentiable with respect to all tensors.
``cross(x, projected, delta_weight, A, D, delta_bias, delta_softplus) -> out``
    :func:`cross_selective_scan`, likewise. A backend without it scans the four sequences.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ops.arguments import checked, require_like
from ops.autocast import without_autocast
from ops.backends import backend_of_scan
from ops.selective_scan import chunked, cpu, reference, triton
from ops.selective_scan.orders import cross_merge, cross_scan, scan_in_four_orders
from ops.selective_scan.reference import Inputs

__all__ = ["BACKENDS", "cross_merge", "cross_scan", "cross_selective_scan", "selective_scan"]

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "cpu": cpu,
    "triton": triton,
}


@checked(ranks={"u": 3, "delta": 3, "A": 2, "B": 4, "C": 4})
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Scan sequences by a diagonal state space whose step, input and output depend on the token.

    Each channel has N states h, initially zero. With Δ = softplus(delta + delta_bias), or without
    the softplus, token t does, in each channel::

        h = exp(Δ_t A) h + Δ_t u_t B_t          out_t = C_t · h + D u_t

    Channels are divided into G groups of neighbours, each with its own B and C. Time and memory are
    linear in L. States are float32 (float64 for float64 tensors), whatever the dtype of the
    tensors. The computation never divides by a decay, so that Δ A may be arbitrarily negative.

    Args:
        u: (B, channels, L).
        delta: (B, channels, L), the steps Δ before bias and softplus.
        A: (channels, N). It should be at most 0, which is not checked.
        B, C: (B, G, N, L), G dividing the channels.
        D: (channels,), the weight of the token itself; default: None, nothing.
        delta_bias: (channels,), added to ``delta``; default: None, nothing.
        delta_softplus: whether steps are the softplus of delta + delta_bias.
        backend: one of :data:`BACKENDS`; default: the fastest that supports the call.

    All tensors are in the dtype of u or float32.

    Returns:
        (B, channels, L) in the dtype of u, differentiable with respect to all tensors.

    Raises:
        TypeError: an argument that is not of the annotated type.
        ValueError: incompatible shapes, dtypes or devices, or an unknown ``backend``.
        NotImplementedError: the given ``backend`` does not support this call; it says why.
    """
    inputs = Inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    batch, channels, tokens = u.shape
    groups, states = B.shape[1], A.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"B must have groups that divide {channels} channels, got {groups}")
    of_group = (batch, groups, states, tokens)
    shapes = {
        **{"delta": (delta, u.shape), "B": (B, of_group), "C": (C, of_group)},
        **_of_channels(channels, A, D, delta_bias),
    }
    require_like("u", u, shapes)
    chosen = _choose(u, A, backend)
    with without_autocast(u.device):
        out: Tensor = chosen.scan(inputs)
    return out


@checked(ranks={"x": 4, "projected": 4, "delta_weight": 3, "A": 2})
def cross_selective_scan(
    x: Tensor,
    projected: Tensor,
    delta_weight: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Scan an NHWC map in four orders by :func:`selective_scan` and sum the outputs of each pixel.

    The orders are those of :func:`cross_scan`. Order k has P of the 4 P channels of A, D and
    delta_bias, from k P on, and its own steps, B and C, the same for all P channels::

        steps, B, C = projected[..., k, :].split([R, N, N])     delta = delta_weight[k] @ steps

    The result is that of :func:`cross_scan`, :func:`selective_scan` and :func:`cross_merge`. On the
    CPU, neither the four sequences nor delta, nor the outputs of single orders, are ever stored.

    Args:
        x: (B, H, W, P).
        projected: (B, H, W, 4 (R + 2 N)), what a linear layer made of x: for each order the R
            numbers its steps are made of, N of B and N of C.
        delta_weight: (4, P, R).
        A: (4 P, N). It should be at most 0, which is not checked.
        D: (4 P,), the weight of the pixel itself; default: None, nothing.
        delta_bias: (4 P,), added to ``delta``; default: None, nothing.
        delta_softplus: whether steps are the softplus of delta + delta_bias.
        backend: one of :data:`BACKENDS`; default: the fastest that supports the call.

    All tensors are in the dtype of x or float32.

    Returns:
        (B, H, W, P) in the dtype of x, differentiable with respect to all tensors.

    Raises:
        TypeError: an argument that is not of the annotated type.
        ValueError: incompatible shapes, dtypes or devices, or an unknown ``backend``.
        NotImplementedError: the given ``backend`` does not support this call; it says why.
    """
    given = (x, projected, delta_weight, A, D, delta_bias, delta_softplus)
    channels, (rank, states) = x.shape[3], (delta_weight.shape[2], A.shape[1])
    shapes = {
        "projected": (projected, (*x.shape[:3], 4 * (rank + 2 * states))),
        "delta_weight": (delta_weight, (4, channels, rank)),
        **_of_channels(4 * channels, A, D, delta_bias),
    }
    require_like("x", x, shapes)
    chosen = _choose(x, A, backend)
    with without_autocast(x.device):
        if hasattr(chosen, "cross"):
            out: Tensor = chosen.cross(*given)
        else:
            out = scan_in_four_orders(chosen.scan, *given)
    return out


_Shapes = dict[str, tuple[Tensor | None, tuple[int, ...]]]  # tensors and what they must be, by name


def _of_channels(channels: int, A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> _Shapes:
    of_channel = (channels,)
    return {
        "A": (A, (channels, A.shape[1])),
        "D": (D, of_channel),
        "delta_bias": (delta_bias, of_channel),
    }


def _choose(x: Tensor, A: Tensor, backend: str | None) -> ModuleType:
    chosen = backend_of_scan(backend, BACKENDS, x, A)
    return reference if x.numel() == 0 or A.numel() == 0 else chosen
