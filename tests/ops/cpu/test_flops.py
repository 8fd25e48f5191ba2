"""Counts of multiply-accumulates: of neighborhood attention, and of torch's functions.

That they are those of whole models is tested in ``tests/backbones/fusing/test_explain.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ops.neighborhood import na2d, na2d_av, na2d_qk
from ops.rewriting.profile import Trace, TracedCall


def _traced(function: Callable[[], object]) -> list[TracedCall]:
    with torch.inference_mode(), Trace(torch.zeros(1), nn.Identity()) as trace:
        function()
    return trace.traced


_A, _B = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
_MAP, _WEIGHT = torch.randn(2, 8, 9, 7), torch.randn(12, 4, 3, 3)
_Q, _K, _V = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda: F.linear(_A, torch.randn(6, 5)),
        lambda: F.conv2d(_MAP, _WEIGHT, padding=1, groups=2),
        lambda: F.conv2d(_MAP, weight=_WEIGHT, stride=2, groups=2),
        lambda: torch.bmm(_A, _B),
        lambda: _A @ _B,
        lambda: torch.matmul(_A, _B),
        lambda: _A.matmul(_B[0]),
        lambda: torch.addmm(torch.randn(6), _A[0], _B[0]),
        lambda: torch.baddbmm(torch.randn(3, 4, 6), _A, _B),
        lambda: F.scaled_dot_product_attention(_Q, _K, _V),
        lambda: F.scaled_dot_product_attention(query=_Q, key=_K, value=_V),
    ],
)
def test_functions_of_torch_are_counted_as_torch_counts_them(
    function: Callable[[], Tensor],
) -> None:
    with FlopCounterMode(display=False) as counter:
        function()
    assert sum(call.flops or 0 for call in _traced(function)) == counter.get_total_flops() > 0


def test_uncounted_operations() -> None:
    calls = _traced(lambda: _A.softmax(-1).add_(1))
    assert [call.flops for call in calls] == [None, None]


_X, _MORE = torch.randn(1, 9, 7, 2, 8), torch.randn(1, 5, 2, 8)
_HEADS, _WEIGHTS = torch.randn(1, 2, 9, 7, 8), torch.randn(1, 2, 9, 7, 15)


@pytest.mark.parametrize(
    ("function", "given", "per_query"),
    [
        (na2d, (_X, _X, _X), 15 * (8 + 8)),
        (partial(na2d, additional_keys=_MORE, additional_values=_MORE), (_X, _X, _X), 20 * (8 + 8)),
        (na2d_qk, (_HEADS, _HEADS), 15 * 8),
        (na2d_av, (_WEIGHTS, _HEADS), 15 * 8),
    ],
)
def test_neighborhood_attention(
    function: Callable[..., Tensor], given: tuple[Tensor, ...], per_query: int
) -> None:
    for causal, expected in ((False, 2 * 9 * 7 * 2 * per_query), (True, None)):
        calls = _traced(partial(function, *given, (3, 5), is_causal=causal))
        assert [c.flops for c in calls if c.kernel.startswith("na_cpu")] == [expected]
