"""Neighborhood attention on the CPU, forward and backward (``forward.h``, ``backward.h``).

Sums are accumulated in float32. On CPUs with AVX512-BF16 but without AMX, bfloat16 queries and keys
are multiplied directly, and weights are rounded to bfloat16 before they multiply values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.arguments import require_shapes
from ops.cpu.call.binding import kernel
from ops.cpu.call.c_arguments import Call
from ops.cpu.call.dispatch import require_dtype
from ops.cpu.call.tensors import dense, dense_channels

_AXES = ("z", "y", "x")


@kernel("neighborhood", "na_forward", returns=2, large_results=True)
def na_cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    with_lse: bool,
) -> Call:
    """The attention and its float32 log-sum-exp, or an empty tensor; see :mod:`ops.neighborhood`.

    No gradients.
    """
    inputs = (query, key, value, additional_keys, additional_values, rpb)
    window = (kernel_size, stride, dilation, is_causal)
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1] if with_lse else 0, dtype=torch.float32)

    def arguments() -> dict[str, Any]:
        written = {"out": _with_channels(out), "lse": _per_query(lse if with_lse else None)}
        return {**_inputs(inputs, window), **written}

    return Call((out, lse), arguments)


@kernel("neighborhood", "na_backward", returns=6, large_results=True)
def na_cpu_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> Call:
    """The gradients of the inputs; that of ``rpb`` is in float32.

    An operator cannot return None, so missing gradients are empty tensors.
    """
    inputs = (query, key, value, additional_keys, additional_values, rpb)
    empty = out.numel() == 0
    grads = [
        query.new_empty(0) if t is None else torch.zeros_like(t) if empty else t.new_empty(t.shape)
        for t in inputs
    ]
    if rpb is not None:
        grads[5] = grads[5].float()

    def arguments() -> Any:
        names = ("query", "key", "value", "additional_key", "additional_value")
        return {
            **_inputs(inputs, (kernel_size, stride, dilation, is_causal)),
            **{
                f"grad_{name}": _with_channels(None if t is None else grad)
                for name, t, grad in zip(names, inputs, grads, strict=False)
            },
            **{"out": _with_channels(out), "lse": _per_query(lse.contiguous())},
            **{"grad_out": _with_channels(grad_out), "grad_lse": _per_query(dense(grad_lse))},
            "grad_rpb": None if rpb is None else grads[5],
        }

    return Call(tuple(grads), dict if empty else arguments)


@kernel("neighborhood", "na_scores", large_results=True)
def na_cpu_scores(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    fill: float,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Call:
    """The scores of :mod:`ops.neighborhood.split`; ``fill`` where a causal window has no key."""
    out = query.new_empty((*query.shape[:-1], math.prod(kernel_size)))
    window = (kernel_size, dilation, is_causal)
    return Call(out, lambda: {**_split(query, key, out, window), "rpb": _table(rpb), "fill": fill})


@kernel("neighborhood", "na_mix", large_results=True)
def na_cpu_mix(
    weights: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Call:
    """Each query's sum of the values in its window, times ``weights``."""
    out = value.new_empty(value.shape)
    return Call(out, lambda: _split(out, value, weights, (kernel_size, dilation, is_causal)))


@kernel("neighborhood", "na_dynamic_mix", large_results=True)
def na_cpu_dynamic_mix(
    query: Tensor,
    key: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    values: Sequence[Tensor],
    kernel_sizes: Sequence[int],
) -> Call:
    """:func:`na_cpu_mix` with the weights ``(query @ (key @ weight) + bias).softmax(-1)``.

    Args:
        query: (B, heads, H · W, depth), float32 or bfloat16; copied unless its channels are dense.
        key: (B, heads, depth, P).
        weights: (P, k²) each, float32.
        biases: (heads, H, W, k²) each, float32 or bfloat16.
        values: (B, heads, H, W, d) each, one shape.
        kernel_sizes: k each, at most H and W.

    Returns:
        (B, H, W, len(values) · heads, d), contiguous. Tensors without another dtype above have that
        of ``query``.
    """
    batch, heads, height, width, dim = values[0].shape
    count, map_axes = len(values), "batch heads height width dim"
    sizes = require_shapes(
        {"pixels": height * width},
        values=(values[0], map_axes),
        query=(query, "batch heads pixels depth"),
        key=(key, "batch heads depth places"),
    )
    parts = list(zip(weights, biases, values, kernel_sizes, strict=True))
    for weight, bias, value, k in parts:
        if not 0 < k <= min(height, width):
            raise ValueError(f"a {k}×{k} kernel does not fit a map of {height}×{width}")
        require_shapes(
            {**sizes, "keys": k * k},
            values=(value, map_axes),
            weights=(weight, "places keys"),
            biases=(bias, "heads height width keys"),
        )
        require_dtype(torch.float32, weights=weight)
        require_dtype(query.dtype, key=key, values=value)
        if bias.dtype != torch.bfloat16:
            require_dtype(torch.float32, biases=bias)
    out = query.new_empty((batch, height, width, count * heads, dim))

    def arguments() -> dict[str, Any]:
        rows = dense_channels(query)
        of_all = {
            **{"batch": batch, "heads": heads, "queries": height * width, "depth": key.shape[2]},
            **{
                "places": sizes["places"],
                "query_stride": rows.stride()[:3],
                "key_stride": key.stride(),
            },
        }
        problems, queries, tensors = [], [], []
        for i, (weight, bias, value, k) in enumerate(parts):
            part = out[:, :, :, i * heads : (i + 1) * heads].permute(0, 3, 1, 2, 4)
            problem = _split(part, value, value, ((k, k), (1, 1), (False, False)))
            begin = i * heads * dim * out.element_size()
            place = {**problem["query"], "data": (out, begin)}
            problems.append(problem)
            queries.append({**of_all, "keys": k * k, "half_bias": bias.dtype == torch.bfloat16})
            tensors.append(
                {
                    **{"out": place, "value": problem["key"], "query": rows, "key": key},
                    **{"weight": weight.contiguous(), "bias": bias.contiguous()},
                }
            )
        lists = {"problems": problems, "queries": queries, "tensors": tensors}
        return {**lists, "count": count}

    return Call(out, arguments)


@kernel("neighborhood", "na_scatter", large_results=True)
def na_cpu_scatter(
    weights: Tensor,
    query: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Call:
    """Each key's sum of the queries that see it, times ``weights``."""
    out = query.new_empty(query.shape)
    return Call(out, lambda: _split(query, out, weights, (kernel_size, dilation, is_causal)))


def _split(
    query: Tensor, key: Tensor, weights: Tensor, window: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Tensors are (B, H, *S, C)."""
    batch, heads, *size, dim = query.shape
    return {
        **{"batch": batch, "heads": heads, "kv_heads": heads},
        **{"dim": dim, "value_dim": 0, "additional": 0, "scale": 1.0},
        **_axes(size, (window[0], (1,) * len(size), *window[1:])),
        **{"threads": torch.get_num_threads(), "bfloat16": query.dtype == torch.bfloat16},
        **{"query": _heads_first(query), "key": _heads_first(key)},
        "weights": _heads_first(weights),
    }


def _heads_first(t: Tensor) -> dict[str, Any]:
    """[B, H, *S, C]; copied unless the channels are dense."""
    t = dense_channels(t)
    batch, head, *spatial, _ = t.stride()
    return _strided(t, (batch, *spatial, head))


def _inputs(inputs: Sequence[Any], window: Sequence[Sequence[int]]) -> dict[str, Any]:
    """``window`` holds kernel sizes, strides, dilations, and whether axes are causal."""
    query, key, value, more_keys, more_values, rpb = inputs
    batch, *size, heads, dim = query.shape
    return {
        **{"batch": batch, "heads": heads, "kv_heads": key.shape[-2]},
        **{"dim": dim, "value_dim": value.shape[-1]},
        "additional": 0 if more_keys is None else more_keys.shape[1],
        **_axes(size, window),
        **{"threads": torch.get_num_threads(), "bfloat16": query.dtype == torch.bfloat16},
        **{"query": _with_channels(query), "key": _with_channels(key)},
        "value": _with_channels(value),
        "additional_key": _with_channels(more_keys),
        "additional_value": _with_channels(more_values),
        "rpb": _table(rpb),
    }


def _axes(size: Sequence[int], window: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The fields of three axes; missing axes are the first ones."""
    missing = 3 - len(size)
    axes = dict(zip(("size", "kernel", "stride", "dilation"), (size, *window[:3]), strict=True))
    return {
        **{name: (*missing * (1,), *values) for name, values in axes.items()},
        "causal": (*missing * (0,), *window[3]),
    }


def _table(rpb: Tensor | None) -> Tensor | None:
    return None if rpb is None else rpb.float().contiguous()


def _with_channels(t: Tensor | None) -> dict[str, Any] | None:
    """[B, *S, H, C] or [B, N, H, C]; copied unless the channels are dense."""
    if t is None:
        return None
    t = dense_channels(t)
    return _strided(t, t.stride()[:-1])


def _per_query(t: Tensor | None) -> dict[str, Any] | None:
    """[B, *S, H]."""
    return None if t is None else _strided(t, t.stride())


def _strided(t: Tensor, strides: Sequence[int]) -> dict[str, Any]:
    """An address with strides of z, y and x; missing axes are the first ones."""
    batch, *spatial, head = strides
    fields = dict(zip(_AXES[3 - len(spatial) :], spatial, strict=True))
    return {"data": t, "batch": batch, **fields, "head": head}
