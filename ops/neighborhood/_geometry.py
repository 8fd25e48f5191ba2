"""The windows of neighborhood attention: which keys a query attends to along each axis.

Neighborhood attention: https://arxiv.org/abs/2204.07143, its dilation: https://arxiv.org/abs/2209.15001,
its stride and causal axes: https://arxiv.org/abs/2504.16922.

An axis of n positions is divided into ``dilation`` groups. Position i is in group g = i mod d at
place p = i div d; the group has L = ceil((n − g) / d) places, and its place j is position j·d + g.
Windows never extend beyond a group, so they are given in places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PARAMS = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"
""":attr:`NAParams.of_operators` in the schemas of operators."""


class Inputs(NamedTuple):
    """The tensors of a call; shapes as in :mod:`ops.neighborhood.functional`."""

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    rpb: Tensor | None = None


@dataclass(frozen=True)
class NAParams:
    """The checked parameters of a call; every tuple has one entry per axis.

    ``scale`` is resolved: the public functions' ``None`` has become head_dim ** -0.5.
    If ``return_lse`` is false, a backend may return ``None`` for the lse.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    scale: float
    return_lse: bool = True

    @property
    def rank(self) -> int:
        """The number of map axes: 1, 2 or 3."""
        return len(self.kernel_size)

    @property
    def of_operators(self) -> tuple[Any, ...]:
        """The parameters for operators, see :data:`PARAMS`, without ``return_lse``."""
        return (self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale)


def group_of(position: Tensor, dilation: int) -> Tensor:
    """The dilation group of every position, position mod dilation.

    Not a remainder, which the ONNX exporter does not support for symbolic dilations.
    """
    return position - position // dilation * dilation


def axis_windows(
    size: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The windows of all queries of an axis; ``size`` may be symbolic.

    Both ends of the window are monotonic in the query's place, no window is empty, and the windows
    of a group cover all of its places.

    Returns:
        start, length: int64 (size,); query i attends to places start[i] … start[i] + length[i] − 1
        of its group, which are the positions place · dilation + i mod dilation.
    """
    position = torch.arange(size, device=device)
    group_size = (size - group_of(position, dilation) + dilation - 1) // dilation
    place = position // dilation
    # The queries of a stride share the window of their leader.
    first = place // stride * stride
    if is_causal:
        leader = torch.minimum(first + stride - 1, group_size - 1)
        start = (leader - kernel_size + 1).clamp(min=0)
        return start, place - start + 1
    leader = torch.minimum(first + stride // 2, group_size - 1)
    start = torch.minimum((leader - kernel_size // 2).clamp(min=0), group_size - kernel_size)
    return start, start * 0 + kernel_size


def cross_index(outer: Tensor, inner: Tensor, size: int) -> Tensor:
    """Row-major indices over two axes from indices over each: (A, B) and (C, D) → (A·C, B·D).

    ``size`` is that of the inner axis.
    """
    return _cross(outer * size, inner, torch.add)


def cross_mask(outer: Tensor, inner: Tensor) -> Tensor:
    """Conjunction over both axes: (A, B) and (C, D) → (A·C, B·D)."""
    return _cross(outer, inner, torch.logical_and)


def _cross(outer: Tensor, inner: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return combine(outer[:, None, :, None], inner[None, :, None, :]).flatten(2).flatten(0, 1)
