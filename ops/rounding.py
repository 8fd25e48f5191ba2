"""Weights of convolutions in fewer bits: the error of one tap is made up for by the next.

Rounded one by one, the taps of a filter have a sum that is off by several rounding errors. Images
and maps after a ReLU are far from zero on average, and neighbouring pixels are alike, so it is this
sum that matters most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ops.arguments import checked

__all__ = ["round_filters", "round_keeping_sums"]


@checked()
def round_keeping_sums(taps: Tensor, dtype: torch.dtype) -> Tensor:
    """Round numbers so that the sum of each row stays the same up to the last number's rounding.

    Each number is rounded together with the error of those before it, from the largest to the
    smallest magnitude.

    Args:
        taps: (..., n) float32.
        dtype: floating-point, with fewer bits.

    Returns:
        (..., n), in ``dtype``.

    Raises:
        ValueError: ``taps`` has no dimension or another dtype, or ``dtype`` is not floating-point.
    """
    if taps.dtype != torch.float32 or taps.ndim == 0:
        raise ValueError(f"taps must be (..., n) float32, got {tuple(taps.shape)}, {taps.dtype}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, got {dtype}")
    order = taps.abs().argsort(dim=-1, descending=True, stable=True)
    wanted = taps.gather(-1, order).movedim(-1, 0).contiguous()  # (n, ...)
    rounded, error = torch.empty_like(wanted), torch.zeros_like(taps[..., 0])
    for i, tap in enumerate(wanted):
        tap = tap + error
        rounded[i] = tap.to(dtype)
        error = (tap - rounded[i]).nan_to_num(0, 0, 0)
    return torch.empty_like(taps).scatter(-1, order, rounded.movedim(0, -1)).to(dtype)


@checked()
@torch.no_grad()
def round_filters(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of a model's convolutions with windows to the numbers of ``dtype``.

    Those are in float32 and keep that dtype.
    """
    if dtype.itemsize >= torch.float32.itemsize or not dtype.is_floating_point:
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight[0, 0].numel() > 1:
            weight = module.weight
            if weight.dtype == torch.float32:
                rounded = round_keeping_sums(weight.flatten(2), dtype)
                weight.copy_(rounded.to(weight.dtype).view(weight.shape))
