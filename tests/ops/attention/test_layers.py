"""The memory that layers of attention take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ops.attention.bilevel import BiLevelRoutingAttention
from ops.attention.rank_augmented import rank_augmented_linear_attention
from ops.attention.window import OverlappingWindowAttention, WindowAttention


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and not func.is_view:
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize(
    ("layer", "side", "most"),
    [
        (WindowAttention(8, 8, 4, 4), 64, 64 * 4 * 8**4),  # all windows' scores
        (OverlappingWindowAttention(8, 8, 4), 64, 64 * 4 * 8**4),
        (BiLevelRoutingAttention(8, 1, 7, 2), 42, 3 * 42**2 * 8),  # gathered keys and values
    ],
    ids=["windows", "overlapping windows", "bi-level"],
)
def test_scores_are_never_materialised(layer: nn.Module, side: int, most: int) -> None:
    x = torch.randn(1, side, side, 8, requires_grad=isinstance(layer, BiLevelRoutingAttention))
    with torch.set_grad_enabled(x.requires_grad), Largest() as largest:
        out = layer(x)
        if x.requires_grad:
            out.sum().backward()
    assert largest.numel <= most


def test_memory_of_linear_attention_grows_with_the_tokens() -> None:
    """As many as would need 160 GB if all pairs were made."""
    maps = [torch.randn(1, 1, 200000, 4) for _ in range(3)]
    assert rank_augmented_linear_attention(*maps).isfinite().all()
