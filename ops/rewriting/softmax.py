"""Softmax: a table that is added before, a conversion after it, and products take no passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.call.dispatch import kernels_apply
from ops.cpu.norm.attention_weights import attention_weights
from ops.cpu.norm.biased_softmax import biased_softmax
from ops.rewriting.graph import Operator, OperatorGraph, Value

__all__ = ["join_products", "join_softmax"]

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


class AttentionWeights(nn.Module):
    """A softmax of products with a table: (B, heads, N, depth), (B, heads, depth, K) → its result.

    Args:
        softmax: of logits (B, heads, ..., K), with N rows in the axes between.
    """

    def __init__(self, softmax: BiasedSoftmax) -> None:
        super().__init__()
        self.softmax = softmax

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        bias, half = self.softmax.bias, self.softmax.dtype == torch.bfloat16
        known = attention_weights.unavailable(query.device, query.dtype) is None
        if known and kernels_apply((query, key)):
            out: Tensor = attention_weights(query, key, bias, half)
            return out
        products = query.to(key.dtype) @ key
        out = self.softmax(products.view(len(query), *bias.shape))
        return out


def join_products(graph: OperatorGraph, operator: Operator) -> bool:
    """``softmax(query @ key + table)``, also of parts of the keys, with float32 products."""
    if operator.function is not _aten.matmul.default or operator.kwargs:
        return False
    (query, key), result = operator.args, operator.result
    if result.dtype != torch.float32 or len(result.shape) != 4 or graph.is_output(result):
        return False
    if not query.shape[:2] == key.shape[:2] == result.shape[:2]:
        return False
    if policy.left_to_torch("gemm", result.dtype) is not None:
        return False
    split = graph.only_user(result)
    first, found = 0, []
    if split is not None and split.function is _aten.split_with_sizes.default:
        if split.args[2:] not in ([-1], [3]):
            return False
        for part in split.results:
            found.append((_softmax_of(graph, part), first, part.shape[-1]))
            first += part.shape[-1]
    else:
        found.append((_softmax_of(graph, result), 0, result.shape[-1]))
    if any(softmax is None for softmax, _, _ in found):
        return False
    source = _before_conversion(graph, operator, query)
    for softmax, begin, count in found:
        assert softmax is not None
        keys = key
        if count != key.shape[-1]:
            keys = graph.insert_before(softmax, _aten.slice.Tensor, key, 3, begin, begin + count)
        graph.replace(softmax, AttentionWeights(softmax.function), source, keys)
    graph.remove_unused()
    return True


def _softmax_of(graph: OperatorGraph, value: Value) -> Operator | None:
    """The softmax of logits (B, heads, N, K), whose rows may be in several axes."""
    while True:
        user = graph.only_user(value)
        if user is None or isinstance(user.function, BiasedSoftmax):
            return user
        if user.function not in (_aten.unflatten.int, _aten.reshape.default, _aten.view.default):
            return None
        shape = user.result.shape
        if len(shape) < 3 or (shape[:2], shape[-1]) != (value.shape[:2], value.shape[-1]):
            return None
        value = user.result


def _before_conversion(graph: OperatorGraph, operator: Operator, value: Value) -> Value:
    """The same in bfloat16 if it was converted from that, and perhaps permuted since."""
    source, steps = value, []
    while source.producer and source.producer.function in (
        _aten.transpose.int,
        _aten.permute.default,
    ):
        steps.append(source.producer)
        source = source.producer.args[0]
    made = graph.made_by(source, _aten.to.dtype)
    if made is None or made.kwargs or made.args[1:] != [torch.float32]:
        return value
    if made.args[0].dtype != torch.bfloat16:
        return value
    source = made.args[0]
    for step in reversed(steps):
        source = graph.insert_before(operator, step.function, source, *step.args[1:])
    return source
