"""Softmax: a table that is added before, a conversion after it, and products take no passes."""

from __future__ import annotations

from typing import Any

import torch

from ops.cpu import policy
from ops.cpu.neighborhood.attention import na_cpu_dynamic_mix, na_cpu_mix
from ops.cpu.norm.softmax import attention_weights, biased_softmax
from ops.inference.layers import FastLinear
from ops.rewriting.graph import Operator, OperatorGraph, Value, chain, is_available
from ops.rewriting.lift import constant_of

__all__ = ["join_mixes", "join_products", "join_softmax"]

_aten = torch.ops.aten


def join_softmax(graph: OperatorGraph, operator: Operator) -> None:
    """``softmax(x + table)`` in float32 over the last axis, also converted to bfloat16."""
    match operator:
        case Operator(_aten.softmax.int, [Value(_aten.add.Tensor, [x, table]) as total, axis]):
            last, absorbed, bias = operator, [total.producer], constant_of(table)
        case _:
            return
    if bias is None or x.constant is not None or x.dtype != torch.float32:
        return
    if axis not in (-1, len(x.shape) - 1) or not total.is_like(x) or not total.once:
        return
    if bias.shape != x.shape[1:] or bias.dtype not in (torch.float32, torch.bfloat16):
        return
    if not is_available(biased_softmax, x.dtype):
        return
    match operator.result.user:
        case Operator(_aten.to.dtype, [_, torch.float32 | torch.bfloat16]) as after:
            last, absorbed = after, [operator, *absorbed]
    dense, half = Value.of_constant(bias.contiguous()), last.result.dtype == torch.bfloat16
    graph.replace(last, biased_softmax, x, dense, half, absorbed=absorbed)


def join_products(graph: OperatorGraph, operator: Operator) -> None:
    """``softmax(query @ linear(key) + table)``, also of parts of the keys, in float32."""
    layer: FastLinear
    key: Value
    match operator:
        case Operator(
            _aten.matmul.default,
            [query, Value(FastLinear(bias=None, activation="none") as layer, [inputs]) as key],
        ):
            result = operator.result
        case _:
            return
    if result.dtype != torch.float32 or len(result.shape) != 4:
        return
    if not query.shape[:2] == key.shape[:2] == result.shape[:2]:
        return
    if policy.left_to_torch("gemm", result.dtype) is not None:
        return
    found = [result]
    match result.user:
        case Operator(_aten.split_with_sizes.default, [_, _, -1 | 3], results=parts):
            found = parts
    softmaxes = [_softmax_of(part) for part in found]
    sources = [_before_conversion(value) for value in (query, inputs)]
    (dtype, *others) = {source.dtype for source, _ in sources}
    if None in softmaxes or others or not is_available(attention_weights, dtype):
        return
    given = []
    for source, steps in sources:
        for step in steps:
            source = graph.insert_before(operator, step.function, source, *step.args[1:])
        given.append(source)
    weights = layer.weight.detach().float().T.split([part.shape[-1] for part in found], dim=1)
    for softmax, weight in zip(softmaxes, weights, strict=True):
        assert softmax is not None
        table = Value.of_constant(weight.contiguous())
        graph.replace(softmax, attention_weights, *given, table, *softmax.args[1:])


def join_mixes(graph: OperatorGraph, operator: Operator) -> None:
    """Neighborhoods mixed with such weights, and concatenated by heads."""
    match operator:
        case Operator(_aten.cat.default, [parts, 3]):
            found = [chain(p, [0, 2, 3, 1, 4], na_cpu_mix, attention_weights) for p in parts]
        case _:
            return
    given: list[list[Any]] = []
    for operators in found:
        match operators:
            case [_, Operator(args=[_, values, size, [1, 1], [False, False]]), weights]:
                given.append([*weights.args[:4], values, size])
            case _:
                return
    queries, keys, maps, biases, values, sizes = (list(a) for a in zip(*given, strict=True))
    squares = all(rows == columns for rows, columns in sizes)
    shapes = {(value.shape, value.dtype) for value in values}
    same = len({*queries}) == len({*keys}) == len(shapes) == 1
    if not squares or not same or queries[0].dtype != values[0].dtype:
        return
    if is_available(na_cpu_dynamic_mix, values[0].dtype):
        mixed = maps, biases, values, [rows for rows, _ in sizes]
        graph.replace(operator, na_cpu_dynamic_mix, queries[0], keys[0], *mixed)


def _softmax_of(value: Value) -> Operator | None:
    """The softmax of logits (B, heads, N, K), whose rows may be in several axes."""
    while (user := value.user) is not None and user.function is not biased_softmax:
        if user.function not in (_aten.unflatten.int, _aten.reshape.default, _aten.view.default):
            return None
        shape = user.result.shape
        if len(shape) < 3 or (shape[:2], shape[-1]) != (value.shape[:2], value.shape[-1]):
            return None
        value = user.result
    return user


def _before_conversion(value: Value) -> tuple[Value, list[Operator]]:
    """The same in bfloat16 if it was converted from that, and the permutations since."""
    source, steps = value, list[Operator]()
    while source.function in (_aten.transpose.int, _aten.permute.default):
        assert source.producer is not None
        steps.insert(0, source.producer)
        source = source.producer.args[0]
    match source:
        case Value(_aten.to.dtype, [Value(dtype=torch.bfloat16) as half, torch.float32]):
            return half, steps
    return value, []
