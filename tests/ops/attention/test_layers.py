"""What holds for every layer of attention: gradients in float32, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import randomise

from ops.attention.bilevel import BiLevelRoutingAttention
from ops.attention.cascaded import CascadedGroupAttention
from ops.attention.factorized import FactorizedAttention
from ops.attention.hilo import HiLoAttention
from ops.attention.large_kernel import LargeKernelAttention
from ops.attention.pooled import PooledAttention
from ops.attention.rank_augmented import RankAugmentedAttention, rank_augmented_linear_attention
from ops.attention.single_head import SingleHeadAttention
from ops.attention.window import OverlappingWindowAttention, WindowAttention
from ops.large_kernel import DilatedReparamConv2d

# By name: a layer, and an input of it whose sides are odd where they may be.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bi-level": (lambda: BiLevelRoutingAttention(8, 2, 3, 2), (2, 7, 5, 8)),
    "cascaded": (
        lambda: CascadedGroupAttention(8, 2, qk_dim=4, window_size=4, table_size=3),
        (2, 8, 6, 5),
    ),
    "dilated branches": (lambda: DilatedReparamConv2d(4, 13), (2, 4, 9, 8)),
    "factorized": (lambda: FactorizedAttention(32, 2, 2, (1, 2), window_size=3), (1, 7, 5, 32)),
    "HiLo": (lambda: HiLoAttention(8, 2, 2, 0.5), (1, 3, 5, 8)),
    "large kernel": (lambda: LargeKernelAttention(4), (1, 4, 9, 7)),
    "overlapping windows": (lambda: OverlappingWindowAttention(4, 2, 2, 1.0), (1, 4, 6, 4)),
    "pooled": (lambda: PooledAttention(8, 2, 2), (2, 15, 8)),
    "rank-augmented": (lambda: RankAugmentedAttention(16, 2), (2, 3, 5, 16)),
    "shifted windows": (lambda: WindowAttention(4, 2, 2, 1), (1, 4, 6, 4)),
    "single head": (lambda: SingleHeadAttention(10, 4, qk_dim=3), (2, 10, 3, 5)),
    "windows": (lambda: WindowAttention(4, 2, 2), (1, 4, 6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_float32_gradients_are_those_of_float64(name: str) -> None:
    """Those of float64 are compared with definitions, layer by layer."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = randomise(make()).eval()
    x = torch.randn(shape, dtype=torch.float64)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        module, leaf = layer.to(dtype), x.to(dtype, copy=True).requires_grad_()
        wanted = [leaf, *(p for p in module.parameters() if p.requires_grad)]
        return [g.double() for g in torch.autograd.grad(module(leaf).square().mean(), wanted)]

    for single, double in zip(*map(gradients, (torch.float32, torch.float64)), strict=True):
        assert (single - double).abs().max() <= 1e-4 * double.abs().max() + 1e-9


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
