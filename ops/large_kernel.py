"""A large depthwise convolution trained with parallel small dilated ones, of UniRepLKNet.

https://arxiv.org/abs/2311.15599
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ops.arguments import checked
from ops.conv import ConvNorm
from ops.reparam import fold_norm_after

__all__ = ["DilatedReparamConv2d", "merge_dilated_kernels"]

# Published (kernel size, dilation) of the parallel branches, by size of the large kernel.
_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


@checked()
def merge_dilated_kernels(
    weights: Sequence[Tensor], dilations: Sequence[int], kernel_size: int
) -> Tensor:
    """Merge dilated depthwise kernels into one that computes the sum of their convolutions.

    All convolutions have stride 1 and size-preserving padding.

    Args:
        weights: (dim, 1, k, k) each, with odd k.
        dilations: one per kernel.
        kernel_size: of the result, odd.

    Returns:
        (dim, 1, kernel_size, kernel_size).

    Raises:
        ValueError: no kernels, an even kernel, or one that exceeds ``kernel_size``.
    """
    if not weights:
        raise ValueError("weights must have at least one kernel, got none")
    merged = weights[0].new_zeros(*weights[0].shape[:2], kernel_size, kernel_size)
    for weight, dilation in zip(weights, dilations, strict=True):
        _check_branch(weight.shape[-1], dilation, kernel_size)
        reach = dilation * (weight.shape[-1] // 2)
        taps = slice(kernel_size // 2 - reach, kernel_size // 2 + reach + 1, dilation)
        merged[:, :, taps, taps] += weight
    return merged


def _check_branch(kernel_size: int, dilation: int, largest: int) -> None:
    span = dilation * (kernel_size - 1) + 1
    if kernel_size % 2 == 0 or largest % 2 == 0 or dilation < 1 or span > largest:
        raise ValueError(
            f"a kernel of {kernel_size} with dilation {dilation} does not fit one of {largest}: "
            f"both must be odd, and the span {span} at most {largest}"
        )


class DilatedReparamConv2d(nn.Module):
    """The sum of a large depthwise convolution and small dilated ones, each with a batch norm.

    (B, dim, H, W) → (B, dim, H, W). ``fuse()`` merges them into one depthwise convolution, see
    :func:`merge_dilated_kernels`.

    Args:
        dim: channels.
        kernel_size: of the large kernel, odd.
        branches: ``(kernel size, dilation)`` of the small ones; default: the published ones, for
            kernels of 5, 7, … 17.

    Raises:
        ValueError: no published branches for ``kernel_size``, or a branch that exceeds it.
    """

    def __init__(
        self, dim: int, kernel_size: int, branches: Sequence[tuple[int, int]] | None = None
    ) -> None:
        super().__init__()
        if branches is None:
            if kernel_size not in _BRANCHES:
                raise ValueError(
                    f"no branches are published for kernel_size {kernel_size}; pass branches, or "
                    f"use one of {', '.join(map(str, _BRANCHES))}"
                )
            branches = _BRANCHES[kernel_size]
        for size, dilation in branches:
            _check_branch(size, dilation, kernel_size)
        self.large = ConvNorm(dim, dim, kernel_size, groups=dim)
        self.branches = nn.ModuleDict(
            {
                f"k{size}_d{dilation}": ConvNorm(dim, dim, size, dilation=dilation, groups=dim)
                for size, dilation in branches
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x)
        for branch in self.branches.values():
            out = out + branch(x)
        return out

    @torch.no_grad()
    def unmerged(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """The state dict with which this layer computes a convolution that was merged.

        The large kernel gets the weight and its norm the bias; the small ones are zero and remain
        so if they are trained, since the scales of their norms are zero, too.

        Args:
            weight: (dim, 1, kernel_size, kernel_size).
            bias: (dim,).
        """
        state = {
            name: torch.zeros(tensor.shape, dtype=weight.dtype)
            for name, tensor in self.state_dict().items()
            if tensor.is_floating_point()
        }
        for name in state:
            if name.endswith("running_var"):
                state[name] += 1
        eps = self.large.norm.eps
        return state | {
            "large.conv.weight": weight,
            "large.norm.weight": torch.ones_like(bias),
            "large.norm.bias": bias,
            "large.norm.running_var": torch.full_like(bias, 1 - eps),
        }

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """One depthwise convolution with a bias."""
        merged = fold_norm_after(self.large.conv, self.large.norm)
        assert merged.bias is not None
        weights, dilations = [merged.weight], [1]
        for branch in self.branches.values():
            assert isinstance(branch, ConvNorm)
            conv = fold_norm_after(branch.conv, branch.norm)
            assert conv.bias is not None
            weights.append(conv.weight)
            dilations.append(conv.dilation[0])
            merged.bias += conv.bias
        merged.weight.copy_(merge_dilated_kernels(weights, dilations, merged.kernel_size[0]))
        return merged
