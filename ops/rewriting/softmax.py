"""Softmax: a table that is added before, a conversion after it, and products take no passes."""

from __future__ import annotations

from typing import Any

import torch

from ops.cpu import policy
from ops.cpu.neighborhood.attention import na_cpu_dynamic_mix, na_cpu_mix
from ops.cpu.norm.softmax import attention_weights, biased_softmax
from ops.inference.layers import FastLinear
from ops.rewriting.graph import Operator, OperatorGraph, Value, is_available

__all__ = ["join_mixes", "join_products", "join_softmax"]

_aten = torch.ops.aten


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
    if not is_available(biased_softmax, x.dtype):
        return False
    absorbed = [total] if last is operator else [operator, total]
    dense, half = Value.of_constant(bias.contiguous()), last.result.dtype == torch.bfloat16
    graph.replace(last, biased_softmax, x, dense, half, absorbed=absorbed)
    return True


def join_products(graph: OperatorGraph, operator: Operator) -> bool:
    """``softmax(query @ linear(key) + table)``, also of parts of the keys, in float32."""
    if operator.function is not _aten.matmul.default or operator.kwargs:
        return False
    (query, key), result = operator.args, operator.result
    layer = graph.made_by(key, FastLinear)
    if layer is None or len(layer.args) != 1 or layer.kwargs:
        return False
    if layer.function.bias is not None or layer.function.activation != "none":
        return False
    if result.dtype != torch.float32 or len(result.shape) != 4 or graph.is_output(result):
        return False
    if not query.shape[:2] == key.shape[:2] == result.shape[:2]:
        return False
    if policy.left_to_torch("gemm", result.dtype) is not None:
        return False
    split = graph.only_user(result)
    parts, found = [key.shape[-1]], [result]
    if split is not None and split.function is _aten.split_with_sizes.default:
        if split.args[2:] not in ([-1], [3]):
            return False
        parts, found = [part.shape[-1] for part in split.results], split.results
    softmaxes = [_softmax_of(graph, part) for part in found]
    query, key = (_before_conversion(graph, operator, v) for v in (query, layer.args[0]))
    if None in softmaxes or query.dtype != key.dtype:
        return False
    if not is_available(attention_weights, query.dtype):
        return False
    weights = layer.function.weight.detach().float().T.split(parts, dim=1)
    for softmax, weight in zip(softmaxes, weights, strict=True):
        assert softmax is not None
        given = query, key, Value.of_constant(weight.contiguous()), *softmax.args[1:]
        graph.replace(softmax, attention_weights, *given)
    graph.remove_unused()
    return True


def join_mixes(graph: OperatorGraph, operator: Operator) -> bool:
    """Neighborhoods mixed with such weights, and concatenated by heads."""
    if operator.function is not _aten.cat.default or operator.kwargs or operator.args[1:] != [3]:
        return False
    given: list[list[Any]] = []
    for part in operator.args[0]:
        moved = graph.permuted(part, [0, 2, 3, 1, 4])
        mix = graph.made_by(moved.args[0], na_cpu_mix) if moved is not None else None
        made = graph.made_by(mix.args[0], attention_weights) if mix is not None else None
        if mix is None or made is None or mix.args[3:] != [[1, 1], [False, False]]:
            return False
        given.append([*made.args[:4], *mix.args[1:3]])
    queries, keys, weights, biases, values, sizes = (list(a) for a in zip(*given, strict=True))
    squares = all(rows == columns for rows, columns in sizes)
    shapes = {(value.shape, value.dtype) for value in values}
    same = len({*map(id, queries)}) == len({*map(id, keys)}) == len(shapes) == 1
    if not squares or not same or queries[0].dtype != values[0].dtype:
        return False
    if not is_available(na_cpu_dynamic_mix, values[0].dtype):
        return False
    parts = weights, biases, values, [rows for rows, _ in sizes]
    graph.replace(operator, na_cpu_dynamic_mix, queries[0], keys[0], *parts)
    graph.remove_unused()
    return True


def _softmax_of(graph: OperatorGraph, value: Value) -> Operator | None:
    """The softmax of logits (B, heads, N, K), whose rows may be in several axes."""
    while True:
        user = graph.only_user(value)
        if user is None or user.function is biased_softmax:
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
