"""Softmax: a table that is added before and a conversion after it take no passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.cpu.call.dispatch import kernels_apply
from ops.cpu.norm.biased_softmax import biased_softmax
from ops.rewriting.graph import Operator, OperatorGraph

__all__ = ["join_softmax"]

_aten = torch.ops.aten


class BiasedSoftmax(nn.Module):
    """``(x + bias).softmax(-1)``, (B, ..., K) → (B, ..., K) in ``dtype``."""

    bias: Tensor

    def __init__(self, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("bias", bias.contiguous())

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}"

    def forward(self, x: Tensor) -> Tensor:
        if kernels_apply((x,)) and biased_softmax.unavailable(x.device, x.dtype) is None:
            out: Tensor = biased_softmax(x, self.bias, self.dtype == torch.bfloat16)
            return out
        return (x + self.bias).softmax(-1).to(self.dtype)


def join_softmax(graph: OperatorGraph, operator: Operator) -> bool:
    """``softmax(x + table)`` in float32 over the last axis, also converted to bfloat16."""
    if operator.function is not _aten.softmax.int:
        return False
    rank, given = len(operator.result.shape), [*operator.args[1:], *operator.kwargs.values()]
    total = graph.made_by(operator.args[0], _aten.add.Tensor)
    if total is None or total.kwargs or graph.only_user(total.result) is None:
        return False
    if given not in ([-1], [rank - 1]):
        return False
    x, table = total.args
    bias = getattr(table, "constant", None)
    if bias is None or x.constant is not None or x.shape != total.result.shape:
        return False
    if bias.shape != x.shape[1:] or x.dtype != torch.float32:
        return False
    if bias.dtype not in (torch.float32, torch.bfloat16):
        return False
    last, after = operator, graph.only_user(operator.result)
    converts = after is not None and after.function is _aten.to.dtype and not after.kwargs
    if after is not None and converts and after.args[1:] in ([torch.float32], [torch.bfloat16]):
        last = after
    made = BiasedSoftmax(bias, last.result.dtype)
    absorbed = [total] if last is operator else [operator, total]
    graph.replace(last, made, x, absorbed=absorbed)
    return True
