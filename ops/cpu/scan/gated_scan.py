"""Gated linear attention on the CPU (``forward.h``), see :mod:`ops.linear_attention`.

States, gates and sums are of float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ops.cpu.binding import Addresses, Call, kernel
from ops.cpu.dispatch import require_dtype
from ops.cpu.structures import structure
from ops.cpu.threads import MACS, threads_for

__all__ = ["gated_scan"]

_PROBLEM = structure("scan/problem.h", "scan::Problem")
_SEQUENCE = structure("scan/problem.h", "scan::Sequence")
_FORWARD = structure("scan/forward.h", "scan::ForwardTensors")


@kernel("gated_scan", "gated_scan_forward", large_results=True)
def gated_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor,
    log_gate_back: Tensor | None,
    bonus: Tensor | None,
    scale: float,
) -> Call:
    """The attention; shapes as in :mod:`ops.linear_attention`. No gradients.

    Raises:
        ValueError: gates or a bonus that are not of float32.
        RuntimeError: the kernel is not available here (its ``unsupported`` tells beforehand).
    """
    require_dtype(torch.float32, log_gate=log_gate, log_gate_back=log_gate_back, bonus=bonus)
    out = query.new_empty(value.shape)

    def arguments() -> Any:
        fields = {
            **_inputs(query, key, value, log_gate, log_gate_back),
            **{"bonus": None if bonus is None else bonus.contiguous(), "out": out},
        }
        return _problem_of(query, value, bonus is not None, scale), Addresses(_FORWARD, fields)

    return Call(out, arguments)


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor, log_gate_back: Tensor | None
) -> dict[str, Any]:
    return {
        **{"query": _sequence(query), "key": _sequence(key), "value": _sequence(value)},
        **{"gate": _sequence(log_gate), "gate_back": _sequence(log_gate_back)},
    }


def _sequence(t: Tensor | None) -> Addresses | None:
    """(B, L, H, C); copied where its channels do not lie side by side."""
    if t is None:
        return None
    t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    names = ("data", "batch", "token", "head")
    return Addresses(_SEQUENCE, dict(zip(names, (t, *t.stride()[:-1]), strict=True)))


def _problem_of(query: Tensor, value: Tensor, apart: bool, scale: float) -> Any:
    sizes = (*query.shape, value.shape[-1])
    bfloat16 = query.dtype == torch.bfloat16
    return _problem(sizes, apart, bfloat16, torch.get_num_threads(), scale)


@functools.lru_cache(maxsize=1024)  # a network has few different ones, and filling them in is slow
def _problem(
    sizes: tuple[int, ...], apart: bool, bfloat16: bool, threads: int, scale: float
) -> Any:
    batch, tokens, heads, dim, value_dim = sizes
    work = batch * tokens * heads * dim * value_dim
    return _PROBLEM(
        batch=batch,
        tokens=tokens,
        heads=heads,
        dim=dim,
        value_dim=value_dim,
        apart=apart,
        bfloat16=bfloat16,
        threads=threads_for(work, MACS, threads),
        scale=scale,
    )
