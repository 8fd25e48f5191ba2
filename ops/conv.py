"""Shared convolution layers: with a norm, residual, Inception-style, before a classifier."""

from __future__ import annotations

from collections import OrderedDict

import torch
from timm.layers import DropPath, SelectAdaptivePool2d
from torch import Tensor, nn

from ops.batch_norm import BatchNorm2d
from ops.init import init_trunc_normal
from ops.reparam import fold_norm_after, fold_norm_before

__all__ = ["ConvHead", "ConvNorm", "ConvResidual", "InceptionDWConv2d", "NormConv", "NormLinear"]


class ConvNorm(nn.Module):
    """A convolution, its batch norm and, if asked for, an activation.

    (B, in_chs, H, W) → (B, out_chs, H', W').

    Args:
        padding: default: ``dilation * (kernel_size - 1) // 2``, which preserves the size at
            stride 1.
        bias: of the convolution; off by default, since the norm has one.
        norm_scale: initial weight of the norm; 0 initialises a residual branch to zero.
        norm_eps: of the norm.
        act_layer: class of the activation; default: none.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_scale: float = 1.0,
        norm_eps: float = 1e-5,
        act_layer: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv2d(
            in_chs, out_chs, kernel_size, stride, padding, dilation, groups, bias=bias
        )
        self.norm = BatchNorm2d(out_chs, eps=norm_eps)
        nn.init.constant_(self.norm.weight, norm_scale)
        self.act = act_layer() if act_layer is not None else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)

    def fuse(self) -> nn.Module:
        """The folded convolution, in a ``Sequential`` with the activation if there is one."""
        conv = fold_norm_after(self.conv, self.norm)
        if self.act is None:
            return conv
        return nn.Sequential(OrderedDict(conv=conv, act=self.act))


class ConvResidual(nn.Module):
    """``x + drop_path(ConvNorm(x))`` with a depthwise convolution; fuses into one convolution.

    (B, dim, H, W) → (B, dim, H, W).
    """

    def __init__(
        self, dim: int, kernel_size: int = 3, *, drop_path: float = 0.0, norm_scale: float = 0.0
    ) -> None:
        super().__init__()
        self.fn = ConvNorm(dim, dim, kernel_size, groups=dim, norm_scale=norm_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fn(x))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """A depthwise convolution whose centre tap includes the identity."""
        conv = fold_norm_after(self.fn.conv, self.fn.norm)
        centre = conv.kernel_size[0] // 2
        conv.weight[:, 0, centre, centre] += 1
        return conv


class NormConv(nn.Module):
    """A batch norm and a 2×2 convolution of stride 2.

    (B, dim, H, W) → (B, out_dim, ⌊H/2⌋, ⌊W/2⌋).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, out_dim, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))

    def fuse(self) -> nn.Module:
        """The convolution alone."""
        return fold_norm_before(self.norm, self.conv)


class NormLinear(nn.Module):
    """A batch norm, then a linear layer: (B, in_features) → (B, out_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features)
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def fuse(self) -> nn.Module:
        """The linear layer alone."""
        return fold_norm_before(self.norm, self.linear)


class InceptionDWConv2d(nn.Module):
    """Depthwise convolution in four branches: identity, square, 1×band and band×1.

    Of InceptionNeXt, https://arxiv.org/abs/2303.16900. Each of the three convolutions gets
    ``int(dim * branch_ratio)`` channels; the first channels are passed through.
    (B, dim, H, W) → (B, dim, H, W).

    Raises:
        ValueError: even kernel sizes, or a ratio that gives a branch no channels.
    """

    def __init__(
        self,
        dim: int,
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
    ) -> None:
        super().__init__()
        if square_kernel_size % 2 == 0 or band_kernel_size % 2 == 0:
            raise ValueError(
                f"kernel sizes must be odd to preserve the map's size, got {square_kernel_size} "
                f"and {band_kernel_size}"
            )
        width = int(dim * branch_ratio)
        if not 0 < 3 * width <= dim:
            raise ValueError(
                f"branch_ratio {branch_ratio} of {dim} channels gives branches of {width}; "
                f"use one from {1 / dim:.3g} to {1 / 3:.3g}"
            )
        square, band = square_kernel_size, band_kernel_size
        self.dwconv_hw = nn.Conv2d(width, width, square, padding=square // 2, groups=width)
        self.dwconv_w = nn.Conv2d(width, width, (1, band), padding=(0, band // 2), groups=width)
        self.dwconv_h = nn.Conv2d(width, width, (band, 1), padding=(band // 2, 0), groups=width)
        self.splits = (dim - 3 * width, width, width, width)

    def forward(self, x: Tensor) -> Tensor:
        identity, square, row, column = x.split(self.splits, dim=1)
        branches = (identity, self.dwconv_hw(square), self.dwconv_w(row), self.dwconv_h(column))
        return torch.cat(branches, dim=1)


class ConvHead(nn.Module):
    """Pointwise convolution, norm, swish, pool, linear: (B, dim, H, W) → (B, num_classes).

    Args:
        hidden_dim: width after the convolution.
        num_classes: 0 returns the pooled hidden features.
        bias: of the convolution.
    """

    proj: nn.Module
    global_pool: nn.Module
    fc: nn.Module

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_classes: int,
        pool_type: str,
        drop_rate: float,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.bias = bias
        self.proj = self.global_pool = nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier; ``pool_type=""`` removes the whole head to return the map.

        Any other pooling restores it, untrained.

        Raises:
            ValueError: classes without pooling.
        """
        if pool_type == "":
            self.proj = self.global_pool = nn.Identity()
        elif pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
            if isinstance(self.proj, nn.Identity):
                self.proj = ConvNorm(self.dim, self.hidden_dim, bias=self.bias, act_layer=nn.SiLU)
                self.proj.apply(init_trunc_normal)
        self.fc = nn.Identity()
        if num_classes:
            if not isinstance(self.global_pool, SelectAdaptivePool2d):
                raise ValueError(
                    f"this head classifies vectors; {num_classes} classes need a pooling, such as "
                    "global_pool='avg'"
                )
            self.fc = nn.Linear(self.hidden_dim * self.global_pool.feat_mult(), num_classes)
            init_trunc_normal(self.fc)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(self.proj(x)))
        return x if pre_logits else self.fc(x)
