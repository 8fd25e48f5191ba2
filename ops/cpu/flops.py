"""FLOP counts of the kernels and of the torch functions used with them.

Multiply-accumulates of convolutions and matrix products count as two operations each. Norms,
activations, softmax, interpolation and scans are not counted; of VMamba's scan, the product that
makes its steps is. Operators without an entry in a table have no count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def kernel_flops(name: str, given: Mapping[str, Any], result: Any) -> int | None:
    """FLOPs of a call of a kernel of :mod:`ops.cpu`; None if there is no count.

    Args:
        name: the operator's name.
        given: its arguments by name.
        result: what it returned.
    """
    count = _KERNELS.get(name)
    # At the start of causal axes, windows are not full.
    if count is None or any(given.get("is_causal", ())):
        return None
    return 2 * int(count(given, result))


def function_flops(operator: Any, args: Sequence[Any], kwargs: Any, result: Any) -> int | None:
    """FLOPs of a call of an operator of torch; None if there is no count."""
    count = _OPERATORS.get(str(operator))
    return None if count is None else 2 * int(count(args, kwargs, result))


# -- multiply-accumulates of kernels --------------------------------------------------------------

_Given = Mapping[str, Any]


def _mlp(given: _Given, result: Any) -> int:
    x, bias1 = given["x"], given["bias1"]  # without bias1, x is the hidden map
    in_features, out_features = x.shape[-1], result.shape[-1]
    hidden = in_features if bias1 is None else len(bias1)
    taps = given.get("taps")  # of the convolution between the layers, (k, k, channels)
    window = 0 if taps is None else taps.shape[0] * taps.shape[1]
    expanded = 0 if bias1 is None else x.numel() * hidden
    pixels = result.numel() // out_features
    return expanded + pixels * hidden * (window + out_features)


def _taps(given: _Given) -> int:
    """Of a depthwise convolution's windows: (k, k, channels)."""
    return math.prod(given["taps"].shape[:2])


def _stem(given: _Given, result: Any) -> int:
    x, (side, stride, padding) = given["x"], given["window"]
    height, width = ((n + 2 * padding - side) // stride + 1 for n in x.shape[2:])
    channels, macs = x.shape[1], 0
    for bias in given["biases"]:
        macs += len(x) * height * width * len(bias) * channels * side**2
        height, width, channels, side = -(-height // 2), -(-width // 2), len(bias), 3
    return macs


def _grouped_attention(given: _Given, result: Any) -> int:
    query, key, value = given["query"], given["key"], given["value"]
    rows, routes = given["rows"], given["routes"]
    seen = rows if given["key_rows"] is None else given["key_rows"]
    keys = key.shape[1] if seen is None else seen.shape[1]
    keys *= 1 if routes is None else routes.shape[2]
    queries = query.shape[1] if rows is None else rows.numel()
    return len(query) * queries * query.shape[2] * keys * (query.shape[3] + value.shape[3])


def _cascaded_attention(given: _Given, result: Any) -> int:
    (heads, width), qk_dim = given["bias"].shape, given["qk_dim"]
    head_dim = width - 2 * qk_dim
    tokens = result.shape[1] * result.shape[2]
    taps = 0 if given["taps"] is None else given["taps"].numel()  # of all heads
    per_token = heads * (head_dim * width + tokens * (qk_dim + head_dim)) + taps
    return len(result) * tokens * per_token


def _response_mlp(given: _Given, result: Any) -> int:
    weights, dim = given["weights"], result.shape[3]
    squeezed, hidden = len(weights[1]), len(weights[6])
    return 2 * result.numel() * hidden + 2 * len(result) * dim * squeezed


def _neighborhood(given: _Given, result: Any) -> int:
    query, value, more = given["query"], given["value"], given["additional_keys"]
    keys = math.prod(given["kernel_size"]) + (0 if more is None else more.shape[1])
    return query.numel() // query.shape[-1] * keys * (query.shape[-1] + value.shape[-1])


def _dynamic_mix(given: _Given, result: Any) -> int:
    query, key, taps = given["query"], given["key"], sum(k * k for k in given["kernel_sizes"])
    mapped = key.numel() * taps
    pairs = query.shape[:-1].numel() * taps
    return mapped + pairs * (query.shape[-1] + result.shape[-1])


_KERNELS: dict[str, Callable[[_Given, Any], int]] = {
    **dict.fromkeys(
        ("packed_linear", "packed_linear_energy"),
        lambda given, result: given["x"].numel() * len(given["bias"]),
    ),
    **dict.fromkeys(("packed_mlp", "depthwise_mlp"), _mlp),
    "depthwise_expansion": lambda given, result: (
        given["x"].numel() * len(given["bias1"]) + result[0].numel() * _taps(given)
    ),
    "packed_conv2d": lambda given, result: result.numel() * math.prod(given["geometry"][:3]),
    # As many as for the convolution without transforms.
    "winograd_conv2d": lambda given, result: (
        result.numel() * (given["x"].shape[1] // given["groups"]) * 9
    ),
    "direct_conv2d": lambda given, result: (
        result.numel()
        * (given["x"].shape[1] // given["geometry"][-1])
        * math.prod(given["geometry"][:2])
    ),
    "depthwise_conv2d": lambda given, result: result.numel() * _taps(given),
    "depthwise_branches": lambda given, result: (
        result.numel() // result.shape[1] * sum(taps.numel() for taps in given["taps"])
    ),
    "packed_stem": _stem,
    "deformable_conv2d": lambda given, result: (
        result.numel() * given["x"].shape[1] * given["kernel_size"] ** 2
    ),
    "grouped_attention": _grouped_attention,
    "gated_attention": lambda given, result: result.numel() * result.shape[1] * result.shape[2] * 2,
    # The state, the weights of keys and their sum.
    "rank_augmented_attention": lambda given, result: (
        result.numel() * (2 * (result.shape[3] // given["num_heads"]) + 2)
    ),
    "cascaded_attention": _cascaded_attention,
    "kan_layer": lambda given, result: (
        given["x"].numel() * len(given["powers"]) * len(given["bias"])
    ),
    "response_mlp": _response_mlp,
    "map_scan": lambda given, result: result.numel() * math.prod(given["weight"].shape[:2]),
    "na_cpu_forward": _neighborhood,
    "na_cpu_dynamic_mix": _dynamic_mix,
    "na_cpu_mix": lambda given, result: given["value"].numel() * math.prod(given["kernel_size"]),
    "na_cpu_scores": lambda given, result: given["query"].numel() * math.prod(given["kernel_size"]),
}

# -- multiply-accumulates of torch's operators ----------------------------------------------------


def _of_weight(args: Sequence[Any], kwargs: Any, result: Any) -> int:
    """Output elements times the size of one output channel's weight."""
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return result.numel() * math.prod(weight.shape[1:])


def _of_matrix(place: int) -> Callable[[Sequence[Any], Any, Any], int]:
    """Output elements times the last axis of the product's first matrix, an argument."""
    return lambda args, kwargs, result: result.numel() * args[place].shape[-1]


def _attention(args: Sequence[Any], kwargs: Any, result: Any) -> int:
    query, key, value = (*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
    rows = query.numel() // query.shape[-1]
    return rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_OPERATORS: dict[str, Callable[[Sequence[Any], Any, Any], int]] = {
    **{f"aten.{name}.default": _of_weight for name in ("conv1d", "conv2d", "linear")},
    "torchvision.deform_conv2d.default": _of_weight,
    **{f"aten.{name}.default": _of_matrix(0) for name in ("bmm", "matmul", "mm")},
    **{f"aten.{name}.default": _of_matrix(1) for name in ("addmm", "baddbmm")},
    "mkldnn._convolution_pointwise.default": _of_weight,
    "mkldnn._linear_pointwise.default": _of_matrix(0),
    "mkldnn._linear_pointwise.binary": _of_matrix(0),
    "aten.scaled_dot_product_attention.default": _attention,
}
