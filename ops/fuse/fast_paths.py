"""The operators that torch's fast paths of attention and encoder layers are made of.

``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call one operator for all of a layer in
inference. It is recorded as linear layers, norms and attention, which rewrites know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ops.rewriting.graph import Value, by_name

__all__ = ["expand"]

_aten = torch.ops.aten

Apply = Callable[..., Value]


def expand(apply: Apply, func: Any, args: Any, kwargs: Any) -> list[Value] | None:
    """The results of a fast path by other operators; None if it is not one, or has a mask.

    Args:
        apply: gives the value of an operator of values.
    """
    if func not in (_ATTENTION, _LAYER):
        return None
    given = by_name(func, args, kwargs)
    if given["mask"] is not None:
        return None
    return _attention(apply, given) if func is _ATTENTION else [_layer(apply, given)]


_ATTENTION = _aten._native_multi_head_attention.default
_LAYER = _aten._transformer_encoder_layer_fwd.default


def _attention(apply: Apply, given: dict[str, Any]) -> list[Value] | None:
    query, key, value = given["query"], given["key"], given["value"]
    heads = given["num_head"]
    if key is not value:
        return None
    batch, tokens, dim = query.shape
    weight, bias = given["qkv_weight"], given["qkv_bias"]
    if query is key:
        joined = apply(_aten.linear.default, query, weight, bias)
        shape = [batch, tokens, 3, heads, dim // heads]
        joined = apply(_aten.reshape.default, joined, shape)
        joined = apply(_aten.permute.default, joined, [2, 0, 3, 1, 4])
        parts = [apply(_aten.select.int, joined, 0, i) for i in range(3)]
    else:
        if weight.constant is None or bias.constant is None:
            return None
        parts = []
        for i, x in enumerate((query, key, value)):
            own = slice(i * dim, (i + 1) * dim)
            given_own = (Value.of_constant(t.constant[own]) for t in (weight, bias))
            part = apply(_aten.linear.default, x, *given_own)
            part = apply(_aten.reshape.default, part, [batch, x.shape[1], heads, dim // heads])
            parts.append(apply(_aten.permute.default, part, [0, 2, 1, 3]))
    if not given["need_weights"]:
        out = apply(_aten.scaled_dot_product_attention.default, *parts)
        return [_joined(apply, out, given)]
    scaled = apply(_aten.mul.Tensor, parts[0], (dim // heads) ** -0.5)
    scores = apply(_aten.matmul.default, scaled, apply(_aten.transpose.int, parts[1], -2, -1))
    weights = apply(_aten.softmax.int, scores, -1)
    out = _joined(apply, apply(_aten.matmul.default, weights, parts[2]), given)
    if given["average_attn_weights"]:
        weights = apply(_aten.mean.dim, weights, [1])
    return [out, weights]


def _joined(apply: Apply, out: Value, given: dict[str, Any]) -> Value:
    batch, heads, tokens, head_dim = out.shape
    out = apply(_aten.transpose.int, out, 1, 2)
    out = apply(_aten.reshape.default, out, [batch, tokens, heads * head_dim])
    return apply(_aten.linear.default, out, given["proj_weight"], given["proj_bias"])


def _layer(apply: Apply, given: dict[str, Any]) -> Value:
    x, dim = given["src"], given["embed_dim"]

    def norm(x: Value, number: int) -> Value:
        weight, bias = given[f"norm_weight_{number}"], given[f"norm_bias_{number}"]
        return apply(_aten.layer_norm.default, x, [dim], weight, bias, given["eps"])

    def attention(x: Value) -> Value:
        qkv = {"query": x, "key": x, "value": x, "num_head": given["num_heads"]}
        (out,) = _attention(apply, {**given, **qkv, "need_weights": False}) or [x]
        return out

    def feed_forward(x: Value) -> Value:
        weights = [
            given[f"ffn_{name}_{number}"] for number in (1, 2) for name in ("weight", "bias")
        ]
        x = apply(_aten.linear.default, x, *weights[:2])
        x = apply(_aten.gelu.default if given["use_gelu"] else _aten.relu.default, x)
        return apply(_aten.linear.default, x, *weights[2:])

    if given["norm_first"]:
        x = apply(_aten.add.Tensor, x, attention(norm(x, 1)))
        return apply(_aten.add.Tensor, x, feed_forward(norm(x, 2)))
    x = norm(apply(_aten.add.Tensor, x, attention(x)), 1)
    return norm(apply(_aten.add.Tensor, x, feed_forward(x)), 2)
