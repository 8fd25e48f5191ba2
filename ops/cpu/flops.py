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
    macs = None if count is None else count(given, result)
    return None if macs is None else 2 * macs


def function_flops(operator: Any, args: Sequence[Any], kwargs: Any, result: Any) -> int | None:
    """FLOPs of a call of an operator of torch; None if there is no count."""
    count = _OPERATORS.get(str(operator))
    return None if count is None else 2 * count(args, kwargs, result)


# -- multiply-accumulates of kernels --------------------------------------------------------------

_Given = Mapping[str, Any]


def _linear(given: _Given, result: Any) -> int:
    return int(given["x"].numel() * len(given["bias"]))


def _mlp(given: _Given, result: Any) -> int:
    x, bias1 = given["x"], given["bias1"]  # without bias1, x is the hidden map
    in_features, out_features = x.shape[-1], result.shape[-1]
    hidden = in_features if bias1 is None else len(bias1)
    taps = given.get("taps")  # of the convolution between the layers, (k, k, channels)
    window = 0 if taps is None else taps.shape[0] * taps.shape[1]
    expanded = 0 if bias1 is None else x.numel() * hidden
    pixels = result.numel() // out_features
    return int(expanded + pixels * hidden * (window + out_features))


def _expansion(given: _Given, result: Any) -> int:
    window = math.prod(given["taps"].shape[:2])
    return int(given["x"].numel() * len(given["bias1"]) + result[0].numel() * window)


def _convolution(given: _Given, result: Any) -> int:
    return int(result.numel() * math.prod(given["geometry"][:3]))


def _direct(given: _Given, result: Any) -> int:
    rows, columns, *_, groups = given["geometry"]
    return int(result.numel() * (given["x"].shape[1] // groups) * rows * columns)


def _winograd(given: _Given, result: Any) -> int:
    """As many as for the convolution without transforms."""
    return int(result.numel() * (given["x"].shape[1] // given["groups"]) * 9)


def _depthwise(given: _Given, result: Any) -> int:
    return int(result.numel() * math.prod(given["taps"].shape[:2]))


def _branches(given: _Given, result: Any) -> int:
    pixels = result.numel() // result.shape[1]
    return int(pixels * sum(taps.numel() for taps in given["taps"]))


def _stem(given: _Given, result: Any) -> int:
    x, (side, stride, padding) = given["x"], given["window"]
    height, width = ((n + 2 * padding - side) // stride + 1 for n in x.shape[2:])
    channels, macs = x.shape[1], 0
    for bias in given["biases"]:
        macs += len(x) * height * width * len(bias) * channels * side**2
        height, width, channels, side = -(-height // 2), -(-width // 2), len(bias), 3
    return int(macs)


def _deformable(given: _Given, result: Any) -> int:
    return int(result.numel() * given["x"].shape[1] * given["kernel_size"] ** 2)


def _grouped_attention(given: _Given, result: Any) -> int:
    query, key, value = given["query"], given["key"], given["value"]
    rows, routes = given["rows"], given["routes"]
    seen = rows if given["key_rows"] is None else given["key_rows"]
    keys = key.shape[1] if seen is None else seen.shape[1]
    keys *= 1 if routes is None else routes.shape[2]
    queries = query.shape[1] if rows is None else rows.numel()
    return int(len(query) * queries * query.shape[2] * keys * (query.shape[3] + value.shape[3]))


def _gated_attention(given: _Given, result: Any) -> int:
    tokens = result.shape[1] * result.shape[2]
    return int(result.numel() * tokens * 2)


def _rank_augmented_attention(given: _Given, result: Any) -> int:
    head_dim = result.shape[3] // given["num_heads"]
    return int(result.numel() * (2 * head_dim + 2))  # state, weights of keys and their sum


def _cascaded_attention(given: _Given, result: Any) -> int:
    (heads, width), qk_dim = given["bias"].shape, given["qk_dim"]
    head_dim = width - 2 * qk_dim
    tokens = result.shape[1] * result.shape[2]
    taps = 0 if given["taps"] is None else given["taps"].numel()  # of all heads
    per_token = heads * (head_dim * width + tokens * (qk_dim + head_dim)) + taps
    return int(len(result) * tokens * per_token)


def _kan(given: _Given, result: Any) -> int:
    return int(given["x"].numel() * len(given["powers"]) * len(given["bias"]))


def _response_mlp(given: _Given, result: Any) -> int:
    weights, dim = given["weights"], result.shape[3]
    squeezed, hidden = len(weights[1]), len(weights[6])
    return int(2 * result.numel() * hidden + 2 * len(result) * dim * squeezed)


def _attention_weights(given: _Given, result: Any) -> int:
    mapped = given["key"].numel() * given["weight"].shape[1]
    return int(mapped + result.numel() * given["query"].shape[3])


def _neighborhood(given: _Given, result: Any) -> int | None:
    query, value, more = given["query"], given["value"], given["additional_keys"]
    if any(given["is_causal"]):  # windows at the start of an axis are not full
        return None
    keys = math.prod(given["kernel_size"]) + (0 if more is None else more.shape[1])
    return int(query.numel() // query.shape[-1] * keys * (query.shape[-1] + value.shape[-1]))


def _split_neighborhood(given: _Given, result: Any) -> int | None:
    if any(given["is_causal"]):
        return None
    channels = given["query"] if "query" in given else given["value"]
    return int(channels.numel() * math.prod(given["kernel_size"]))


def _dynamic_mix(given: _Given, result: Any) -> int:
    query, key, taps = given["query"], given["key"], sum(k * k for k in given["kernel_sizes"])
    mapped = key.numel() * taps
    pairs = query.shape[:-1].numel() * taps
    return int(mapped + pairs * (query.shape[-1] + result.shape[-1]))


def _map_scan(given: _Given, result: Any) -> int:
    return int(result.numel() * math.prod(given["weight"].shape[:2]))


_KERNELS: dict[str, Callable[[_Given, Any], int | None]] = {
    **dict.fromkeys(("packed_linear", "packed_linear_energy"), _linear),
    **dict.fromkeys(("packed_mlp", "depthwise_mlp"), _mlp),
    "depthwise_expansion": _expansion,
    "packed_conv2d": _convolution,
    "winograd_conv2d": _winograd,
    "direct_conv2d": _direct,
    "depthwise_conv2d": _depthwise,
    "depthwise_branches": _branches,
    "packed_stem": _stem,
    "deformable_conv2d": _deformable,
    "attention_weights": _attention_weights,
    "grouped_attention": _grouped_attention,
    "gated_attention": _gated_attention,
    "rank_augmented_attention": _rank_augmented_attention,
    "cascaded_attention": _cascaded_attention,
    "kan_layer": _kan,
    "response_mlp": _response_mlp,
    "map_scan": _map_scan,
    **dict.fromkeys(("na_cpu_output", "na_cpu_forward"), _neighborhood),
    "na_cpu_dynamic_mix": _dynamic_mix,
    **dict.fromkeys(("na_cpu_mix", "na_cpu_scores"), _split_neighborhood),
}

# -- multiply-accumulates of torch's operators ----------------------------------------------------


def _of_weight(args: Sequence[Any], kwargs: Any, result: Any) -> int:
    """Output elements times the size of one output channel's weight."""
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return int(result.numel() * math.prod(weight.shape[1:]))


def _of_first(args: Sequence[Any], kwargs: Any, result: Any) -> int:
    """Output elements times the last axis of the first matrix."""
    return int(result.numel() * args[0].shape[-1])


def _of_second(args: Sequence[Any], kwargs: Any, result: Any) -> int:
    """The same, for a product that is added to the first argument."""
    return int(result.numel() * args[1].shape[-1])


def _attention(args: Sequence[Any], kwargs: Any, result: Any) -> int:
    query, key, value = (*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
    rows = query.numel() // query.shape[-1]
    return int(rows * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


_OPERATORS: dict[str, Callable[[Sequence[Any], Any, Any], int]] = {
    **{f"aten.{name}.default": _of_weight for name in ("conv1d", "conv2d", "linear")},
    "torchvision.deform_conv2d.default": _of_weight,
    **{f"aten.{name}.default": _of_first for name in ("bmm", "matmul", "mm")},
    **{f"aten.{name}.default": _of_second for name in ("addmm", "baddbmm")},
    "mkldnn._convolution_pointwise.default": _of_weight,
    "mkldnn._linear_pointwise.default": _of_first,
    "mkldnn._linear_pointwise.binary": _of_first,
    "aten.scaled_dot_product_attention.default": _attention,
}
