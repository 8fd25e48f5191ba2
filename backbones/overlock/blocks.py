"""Blocks of OverLoCK: static ones, and dynamic ones, whose kernels are computed from a context.

Meng Lou and Yizhou Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with
Context-Mixing Dynamic Kernels", https://arxiv.org/abs/2502.20087.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite
from torch import Tensor, nn

from ops.batch_norm import BatchNorm2d
from ops.conv import ConvNorm
from ops.init import trunc_normal
from ops.large_kernel import DilatedReparamConv2d
from ops.neighborhood import na2d_av
from ops.position import ConvPosition
from ops.reparam import fold_norm_after, fold_norm_before, fold_scale_after
from ops.sizes import larger, smaller

# (kernel size, dilation) of the parallel branches, by size of the large kernel. Not UniRepLKNet's.
_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
_SMALL_KERNEL = 5  # of the first half of a dynamic block's channels
_POOLED = 7  # the context's rows and columns, of which each is a key


class ChannelAffine(nn.Module):
    """A scale and a shift for each channel, as on the shortcuts: (B, dim, H, W) → (B, dim, H, W).

    The scales are 4-D, so that weight decay applies to them as in the original.
    """

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(value * torch.ones(dim, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.view(-1, 1, 1), x, self.weight.view(-1, 1, 1))


class GlobalResponseNorm(nn.Module):
    """Global response norm: (B, dim, H, W) → (B, dim, H, W).

    Of ConvNeXt V2, https://arxiv.org/abs/2301.00808. Weight decay applies to both parameters.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.beta: nn.Parameter | None = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        energy = x.norm(p=2, dim=(2, 3), keepdim=True)
        x = x * (1 + self.gamma * (energy / (energy.mean(dim=1, keepdim=True) + self.eps)))
        return x if self.beta is None else x + self.beta


class LargeKernel(nn.Module):
    """A re-parameterised large depthwise convolution and a norm, on (B, dim, H, W)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size not in _BRANCHES:
            raise ValueError(f"kernel_sizes must be among {tuple(_BRANCHES)}, got {kernel_size}")
        self.conv = DilatedReparamConv2d(dim, kernel_size, _BRANCHES[kernel_size])
        self.norm = BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fuse(self) -> nn.Module:
        """One depthwise convolution."""
        conv = self.conv.fuse()
        assert isinstance(conv, nn.Conv2d)
        return fold_norm_after(conv, self.norm)


class Mlp(nn.Module):
    """Pointwise, GELU, 3×3 depthwise, response norm, pointwise, on (B, dim, H, W)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.dwconv = ConvPosition(hidden_dim)
        self.grn = GlobalResponseNorm(hidden_dim)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.dwconv(self.act(self.fc1(x)))))

    def fuse(self) -> nn.Module:
        """Fold the response norm's shift into the layer after it."""
        if self.grn.beta is not None:
            shift = self.fc2.weight.flatten(1) @ self.grn.beta.flatten()
            self.fc2 = fold_scale_after(self.fc2, torch.ones_like(shift), shift)
            self.grn.beta = None
        return self


def squeeze_excite(dim: int) -> nn.Module:
    """Squeeze-and-excitation: (B, dim, H, W) → (B, dim, H, W)."""
    return SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU)


class Block(nn.Module):
    """Depthwise convolutions, small and large, and an MLP, on (B, dim, H, W).

    ``layer_scale`` is the initial scale of the shortcut (not of the branch); None for none.
    """

    def __init__(
        self, dim: int, kernel_size: int, drop_path: float, layer_scale: float | None
    ) -> None:
        super().__init__()
        self.dwconv = ConvPosition(dim)
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.lk = LargeKernel(dim, kernel_size)
        self.se = squeeze_excite(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)
        self.ls = nn.Identity() if layer_scale is None else ChannelAffine(dim, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return self.ls(x) + self.drop_path(self.mlp(self.se(self.lk(self.norm(x)))))


class Fusion(nn.Module):
    """Values of a dynamic block: (B, dim, H, W), with the context, → (B, out_dim, H, W)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dwconv = ConvNorm(dim, dim, 3, groups=dim, bias=True, act_layer=nn.GELU)
        self.fc = nn.Conv2d(dim, out_dim, 1)
        self.grn = GlobalResponseNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.grn(self.fc(self.dwconv(x)))


class ContextMixing(nn.Module):
    """Dynamic depthwise convolution: each position and head has a kernel, computed from a context.

    The affinities of a query to 7×7 means of the context are mapped to the taps of a 5×5 kernel for
    the first half of the channels, and of a k×k kernel for the second. A softmax over the taps
    follows. At borders, windows are shifted inwards; a map that is smaller than the kernel is
    enlarged, and its result averaged. The query and either half have ``num_heads``.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(
                f"num_heads must divide half of the stage's channels, got {num_heads} for {dim}"
            )
        self.num_heads = num_heads
        self.kernel_sizes = (_SMALL_KERNEL, kernel_size)
        self.scale: float | None = (dim // num_heads) ** -0.5
        self.query = ConvNorm(dim, dim // 2)
        self.key = ConvNorm(context_dim, dim // 2)
        taps = sum(k * k for k in self.kernel_sizes)
        self.tap_weight = nn.Parameter(torch.empty(taps, _POOLED**2))
        self.tap_bias = nn.Parameter(torch.zeros(taps))
        trunc_normal(self.tap_weight)
        self.rpb1, self.rpb2 = (
            nn.Parameter(torch.zeros(num_heads, 2 * k - 1, 2 * k - 1)) for k in self.kernel_sizes
        )
        self.proj = ConvNorm(dim, dim)

    def forward(self, value: Tensor, x: Tensor, context: Tensor, offsets: Offsets) -> Tensor:
        """Values and map (B, dim, H, W), context (B, context_dim, H, W) → (B, dim, H, W).

        ``offsets`` are those of :func:`window_offsets`.
        """
        size = value.shape[2], value.shape[3]
        fitted = enlarged(size, self.kernel_sizes[1])
        is_enlarged = not _are_known(fitted) or fitted != size
        if is_enlarged:
            value, x, context = (
                F.interpolate(t, size=fitted, mode="bilinear") for t in (value, x, context)
            )
        parts = [
            na2d_av(weights, self._to_heads(part), kernel_size).permute(0, 2, 3, 1, 4)
            for weights, part, kernel_size in zip(
                self._kernels(x, context, offsets),
                value.chunk(2, dim=1),
                self.kernel_sizes,
                strict=True,
            )
        ]  # (B, H, W, heads, d) of either half
        out = torch.cat(parts, dim=3).flatten(3).permute(0, 3, 1, 2)
        return self.proj(adaptive_mean(out, size) if is_enlarged else out)

    def _kernels(self, x: Tensor, context: Tensor, offsets: Offsets) -> list[Tensor]:
        """The kernels of either half of the channels: (B, num_heads, H, W, k²) each."""
        query = self.query(x).flatten(2).unflatten(1, (self.num_heads, -1))  # (B, heads, d, HW)
        key = self.key(adaptive_mean(context, (_POOLED, _POOLED)))
        key = key.flatten(2).unflatten(1, (self.num_heads, -1))  # (B, heads, d, 49)
        if query.is_cpu:
            # These small products would take longer in a dtype that the CPU does not multiply.
            precise = torch.promote_types(query.dtype, torch.float32)
            query, key = query.to(precise), key.to(precise)
        # Affinities are only used through a linear map, which is applied to the keys instead.
        weight = self.tap_weight.to(key.dtype).transpose(0, 1)
        if self.scale is not None:
            weight = self.scale * weight
        key = key @ weight  # (B, heads, d, 25 + k²)
        taps = query.transpose(-2, -1) @ key  # (B, heads, HW, 25 + k²)
        size = x.shape[2:]
        areas = [k * k for k in self.kernel_sizes]
        return [
            (part.unflatten(2, size) + (position_bias(table, *places) + bias)).softmax(dim=-1)
            for part, bias, table, places in zip(
                taps.split(areas, dim=-1),
                self.tap_bias.split(areas),
                (self.rpb1, self.rpb2),
                offsets,
                strict=True,
            )
        ]

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Scale the weights instead of the affinities."""
        if self.scale is not None:
            trains = self.tap_weight.requires_grad
            self.tap_weight = nn.Parameter(self.scale * self.tap_weight, requires_grad=trains)
            self.scale = None
        return self

    def _to_heads(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, num_heads, H, W, C / num_heads)."""
        return x.unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2)


def enlarged(size: Sequence[int], kernel_size: int) -> tuple[int, int]:
    """The size of a map to which a kernel is applied: larger if a side is below the kernel's."""
    height, width = size
    shorter = smaller(height, width)
    if isinstance(shorter, int) and shorter >= kernel_size:
        return height, width
    # In this order, in floating point, the sides are the original's. Symbolic ones may be too long
    # to be enlarged, for which the quotient is at most 1.
    height, width = (
        larger(larger(kernel_size, side), torch.sym_int(kernel_size / shorter * side))
        for side in size
    )
    return height, width


def adaptive_mean(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``F.adaptive_avg_pool2d``, also of and to symbolic sizes, which ONNX lacks."""
    if _are_known((*x.shape[2:], *size)):
        return F.adaptive_avg_pool2d(x, size)
    rows, columns = (_means(n, m, x) for n, m in zip(x.shape[2:], size, strict=True))
    return rows @ x @ columns.mT


def _means(source: int, target: int, like: Tensor) -> Tensor:
    """The means of adaptive pooling along an axis, as a matrix (target, source)."""
    place = torch.arange(source, device=like.device)
    start = torch.arange(target, device=like.device)[:, None] * source
    is_inside = (place >= start // target) & (place < (start + source + target - 1) // target)
    weights = is_inside.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)


def _are_known(sizes: Sequence[int]) -> bool:
    """Whether none is symbolic."""
    return all(isinstance(side, int) for side in sizes)


Offsets = list[tuple[Tensor, Tensor]]


def window_offsets(size: Sequence[int], kernel_size: int, device: torch.device) -> Offsets:
    """Places in the bias tables of the 5×5 and the k×k kernel, by row and by column.

    Key − query + k − 1 of each position and tap: (H · k,) and (W · k,); ``size`` is that of the map
    before it is enlarged.
    """
    offsets = []
    for k in (_SMALL_KERNEL, kernel_size):
        tap, of_axes = torch.arange(k, device=device), []
        for side in enlarged(size, kernel_size):
            behind = torch.arange(side - 1, -1, -1, device=device)
            first = torch.minimum((behind + (k - side)).clamp(min=k // 2), behind)
            of_axes.append((first[:, None] + tap).flatten())
        offsets.append((of_axes[0], of_axes[1]))
    return offsets


def position_bias(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The bias of each tap at each position: (heads, 2k − 1, 2k − 1) → (heads, H, W, k²)."""
    kernel_size = (table.shape[-1] + 1) // 2
    table = table.index_select(1, rows).index_select(2, columns)
    table = table.unflatten(2, (-1, kernel_size)).unflatten(1, (-1, kernel_size))
    return table.transpose(2, 3).flatten(3)


class DynamicBlock(nn.Module):
    """A dynamic convolution under the guidance of a context, a gate and an MLP.

    Map (B, dim + context_dim, H, W), context (B, context_dim, H, W) → a map of the first's shape.
    The last channels of a map are its own context, which the blocks refine.

    With ``mixes_context``, the given context is added to the map's own. ``layer_scale`` is the
    initial scale of the shortcuts (not of the branches).
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        kernel_size: int,
        drop_path: float,
        layer_scale: float,
        *,
        mixes_context: bool = True,
    ) -> None:
        super().__init__()
        both = dim + context_dim
        self.dims = (dim, context_dim)
        self.x_scale = ChannelAffine(context_dim, 1.0) if mixes_context else None
        self.h_scale = ChannelAffine(context_dim, 1.0) if mixes_context else None
        self.dwconv1 = ConvPosition(both)
        self.norm1 = LayerNorm2d(both, eps=1e-6)
        self.fusion = Fusion(both, dim)
        self.gate = ConvNorm(dim, dim, act_layer=nn.SiLU)
        self.lepe = LargeKernel(dim, kernel_size)
        self.mix = ContextMixing(dim, context_dim, num_heads, kernel_size)
        self.se = squeeze_excite(dim)
        self.norm: nn.Module = BatchNorm2d(dim)
        self.proj = nn.Conv2d(dim, both, 1)
        self.ls1 = ChannelAffine(both, layer_scale)
        self.dwconv2 = ConvPosition(both)
        self.norm2 = LayerNorm2d(both, eps=1e-6)
        self.mlp = Mlp(both, 3 * dim)
        self.ls2 = ChannelAffine(both, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, context: Tensor, offsets: Offsets) -> Tensor:
        if self.x_scale is not None and self.h_scale is not None:
            x, own = x.split(self.dims, dim=1)
            x = torch.cat((x, self.x_scale(own) + self.h_scale(context)), dim=1)
        x = self.dwconv1(x)
        normed = self.norm1(x)
        value = self.fusion(normed)
        y = self.mix(value, *normed.split(self.dims, dim=1), offsets) + self.lepe(value)
        y = self.proj(self.norm(self.se(y) * self.gate(value)))
        x = self.dwconv2(self.ls1(x) + self.drop_path(y))
        return self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))

    def fuse(self) -> nn.Module:
        """Fold the norm before the last pointwise convolution into it."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.proj = fold_norm_before(self.norm, self.proj)
            self.norm = nn.Identity()
        return self
