"""Attention in windows reads and writes the tokens of a map where they are.

Partitions, shifts and their inverses only change the order of tokens. Linear layers give the same
for any order, so both surround attention without copies. https://arxiv.org/abs/2103.14030
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.attention.grouped import LINE, grouped_attention
from ops.inference.layers import FastLinear
from ops.rewriting.graph import Operator, OperatorGraph, Value, is_available

__all__ = ["WindowedAttention", "join_windows"]

_aten = torch.ops.aten
_VIEWS = {
    *(_aten.reshape.default, _aten.view.default, _aten.flatten.using_ints, _aten.unflatten.int),
    *(_aten.permute.default, _aten.transpose.int, _aten.roll.default, _aten.contiguous.default),
    *(_aten.unbind.int, _aten.select.int, _aten.chunk.default, _aten.split.Tensor),
    *(_aten.squeeze.dim, _aten.unsqueeze.default),
}
_MOST_INDICES = 1 << 25  # of a map whose order is followed: 128 MiB


class _Part(NamedTuple):
    """The place of queries, keys or values in a token: the first channel and the step of heads."""

    start: int
    step: int


class WindowedAttention(nn.Module):
    """softmax(scale · query · keyᵀ + bias) · value in windows, (..., in) → (..., dim).

    Args:
        rows: (windows, N), the tokens of each window of all images; each is in one of them.
        bias: (windows, heads, N, N), added to the scores; many windows have the same.
        parts: of queries, keys and values among the inputs.
        head_dim: of each head.
        scale: of the logits.
    """

    rows: Tensor
    terms: Tensor
    lines: Tensor
    kinds: Tensor

    def __init__(
        self,
        rows: Tensor,
        bias: Tensor,
        parts: tuple[_Part, _Part, _Part],
        head_dim: int,
        scale: float,
    ) -> None:
        super().__init__()
        self.parts, self.head_dim, self.scale = parts, head_dim, scale
        kinds, of_window = bias.unique(dim=0, return_inverse=True)
        count, heads, tokens, _ = kinds.shape
        blocks = -(-tokens // LINE)
        padded = kinds.new_zeros(heads, count, blocks * LINE, tokens)
        padded[:, :, :tokens] = kinds.transpose(0, 1) / scale
        terms = padded.unflatten(2, (blocks, LINE)).transpose(3, 4).reshape(heads, -1, LINE)
        lines = torch.arange(terms.shape[1], dtype=torch.int32).view(count, blocks, tokens)
        self.register_buffer("rows", rows.int().contiguous())
        self.register_buffer("terms", terms.contiguous())
        self.register_buffer("lines", lines)
        self.register_buffer("kinds", of_window.int())

    def extra_repr(self) -> str:
        return f"parts={self.parts}, head_dim={self.head_dim}, scale={self.scale}"

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2).contiguous()
        query, key, value = (self._heads(tokens, part) for part in self.parts)
        out = query.new_empty(query.shape)
        terms = self.terms, self.lines, self.kinds
        grouped_attention(query, key, value, out, self.rows, None, None, *terms, self.scale)
        return out.view(*x.shape[:-1], -1)

    def _heads(self, x: Tensor, part: _Part) -> Tensor:
        """(tokens, in) → (1, tokens, heads, head_dim)."""
        size = 1, len(x), len(self.terms), self.head_dim
        stride = x.numel(), x.shape[1], part.step, 1
        return x.as_strided(size, stride, x.storage_offset() + part.start)


class _Scores(NamedTuple):
    """``product + bias``, before the softmax."""

    product: Operator
    bias: Tensor  # (groups, heads, N, N)


def join_windows(graph: OperatorGraph, operator: Operator) -> None:
    """``unpartition(linear(attention(linear(partition(x)))))`` with terms added to scores."""
    scores = _scores(operator) if operator.function is _aten.softmax.int else None
    if scores is None or not is_available(grouped_attention, operator.result.dtype):
        return
    mixed = operator.result.user
    match mixed:
        case Operator(_aten.matmul.default, [weights, value]) if weights is operator.result:
            query, key = scores.product.args
            found = [_source(part) for part in (query, key, value)]
        case _:
            return
    match found[0][0]:
        case Value(FastLinear(activation="none") as first, [inputs]) as tokens if all(
            source is tokens for source, _, _ in found
        ):
            x, steps, factor = _source(inputs)
        case _:
            return
    if factor != 1 or not 0 < tokens.shape.numel() <= _MOST_INDICES:
        return
    rows, bias = _rows(x, steps), scores.bias
    if rows is None or rows.shape != bias.shape[::3]:
        return
    parts: Any = tuple(_part(tokens, steps, i == 1) for i, (_, steps, _) in enumerate(found))
    projected = _projection(mixed.result)
    final = None if projected is None else _final(projected.result, rows)
    if projected is None or final is None or None in parts or final.shape[:-1] != x.shape[:-1]:
        return
    heads, head_dim = mixed.result.shape[1], mixed.result.shape[3]
    if query.shape[3] != head_dim or not policy.softmax_attention_by_kernel(rows.shape[1], x.dtype):
        return
    scale = math.prod(factor for _, _, factor in found)
    attention = WindowedAttention(rows, bias, parts, head_dim, scale)
    last = projected.function
    widths = first.out_features, heads * head_dim, last.out_features
    made = x
    for layer, width in zip((first, attention, last), widths, strict=True):
        made = graph.insert_before(projected, layer, made, shape=(*x.shape[:-1], width))
    graph.substitute(final, made)


def _scores(operator: Operator) -> _Scores | None:
    """The input of a softmax over the last axis."""
    value, *given = [*operator.args, *operator.kwargs.values()]
    if given not in ([-1], [len(operator.result.shape) - 1]):
        return None
    steps: list[Any] = []  # of the bias: tensors that are added, and shapes
    while value.once:
        match value:
            case Value(_aten.reshape.default, [before, *_]):
                steps.insert(0, value.shape)
            case Value(_aten.add.Tensor, [before, Value(constant=Tensor() as term)]):
                steps.insert(0, term.float())
            case _:
                break
        value = before
    product = value.producer
    if value.function is not _aten.matmul.default or not steps or not value.once:
        return None
    if len(value.shape) != 4 or value.shape[2] != value.shape[3]:
        return None
    bias = torch.zeros(value.shape, device="cpu")
    for step in steps:
        bias = bias + step if isinstance(step, Tensor) else bias.reshape(step)
    return _Scores(product, bias) if bias.shape == value.shape else None


_Steps = list[tuple[Operator, int]]


def _source(value: Value) -> tuple[Value, _Steps, float]:
    """The value at the start of a chain of views, the views in order, and the constant factors."""
    steps: _Steps = []
    factor = 1.0
    while (made := value.producer) is not None:
        if made.function is _aten.mul.Tensor and isinstance(made.args[1], int | float):
            factor *= made.args[1]
        elif made.function in _VIEWS:
            steps.append((made, made.results.index(value)))
        else:
            break
        value = made.args[0]
    return value, steps[::-1], factor


def _views_after(value: Value) -> Iterator[tuple[Operator, Value]]:
    """The views of a value, each the only user of the one before, with their results."""
    while (user := value.user) is not None and user.function in _VIEWS and len(user.results) == 1:
        value = user.result
        yield user, value


def _followed(steps: _Steps, index: Tensor) -> Tensor:
    """Views of a tensor."""
    for operator, result in steps:
        made = operator.function(index, *operator.args[1:], **operator.kwargs)
        index = made[result] if operator.returns_list else made
    return index


def _indices(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int32, device="cpu").view(shape)


def _is_view(t: Tensor, whole: Tensor) -> bool:
    return t.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _rows(x: Value, steps: _Steps) -> Tensor | None:
    """The tokens of ``x`` in the order that views give, (groups, N); None if they are not whole."""
    channels = x.shape[-1]
    index = _followed(steps, _indices(*x.shape))
    if index.ndim < 3 or index.shape[-1] != channels or index.numel() != x.shape.numel():
        return None
    starts = index[..., :1]
    if not torch.equal(index, starts + _indices(channels)) or (starts % channels).any():
        return None
    return (starts[..., 0] // channels).flatten(0, -2)


def _part(inputs: Value, steps: _Steps, is_key: bool) -> _Part | None:
    """The place of (groups, heads, N, head_dim), for keys transposed, in (..., N, in)."""
    whole = torch.empty(inputs.shape, device="cpu")
    part = _followed(steps, whole)
    if part.ndim != 4 or not _is_view(part, whole):
        return None
    part = part.transpose(2, 3) if is_key else part
    of_group = part.shape[2] * whole.shape[-1]
    if part.stride() != (of_group, part.stride(1), whole.shape[-1], 1):
        return None
    is_whole = part.shape[0] * of_group == whole.numel()
    return _Part(int(part.storage_offset()), part.stride(1)) if is_whole else None


def _projection(mixed: Value) -> Operator | None:
    """The linear layer that reads the heads (groups, heads, N, head_dim) as (..., N, dim)."""
    groups, heads, tokens, head_dim = mixed.shape
    views = list(_views_after(mixed))
    last = views[-1][1] if views else mixed
    match last.user:
        case Operator(FastLinear(activation="none"), [_]) as projected:
            whole = torch.empty(groups, tokens, heads, head_dim, device="cpu")
            read = _followed([(view, 0) for view, _ in views], whole.transpose(1, 2))
            is_dense = _is_view(read, whole) and read.is_contiguous()
            return projected if is_dense and read.shape[-1] == heads * head_dim else None
    return None


def _final(value: Value, rows: Tensor) -> Value | None:
    """The last view of a layer's windowed results that restores the order of tokens."""
    channels, final = value.shape[-1], None
    index = (rows.view(-1, 1) * channels + _indices(channels)).view(value.shape)
    wanted = _indices(index.numel())
    for view, result in ((None, value), *_views_after(value)):
        index = index if view is None else _followed([(view, 0)], index)
        if index.shape[-1] == channels and torch.equal(index.flatten(), wanted):
            final = result
    return final
