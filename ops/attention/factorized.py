"""Factorized attention: every pixel attends to tokens fused across dilated windows, and globally.

Of FaViT, https://arxiv.org/abs/2312.08614: the attention matrix is factorized into sparse ones, a
local group per dilation and one global group, at the cost of window attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ops.arguments import checked
from ops.attention.softmax import softmax_attention
from ops.padding import reflected_positions
from ops.position import ConvPosition
from ops.sizes import larger

__all__ = ["FactorizedAttention", "cross_window_fusion", "tap_positions"]


@checked(ranks={"x": 4})
def cross_window_fusion(
    x: Tensor, num_heads: int, window_size: int = 7, dilation: int = 1
) -> Tensor:
    """One token for each tap of a dilated window, averaged over all windows of the map.

    The map is divided into windows of ``dilation * (window_size - 1) + 1`` pixels per side, of
    which ``window_size`` per side, the taps, are used. Incomplete windows at the bottom and right
    are padded by reflection, however small the map. The average mixes channels, as in the published
    model: for each tap, the windows' channels are concatenated (window by window), and channel j of
    the token is the mean of the j-th run of as many entries as there are windows.

    Args:
        x: (B, H, W, dim).
        num_heads: number of heads that channels are split into before mixing.
        window_size: taps per side.
        dilation: distance between taps in pixels.

    Returns:
        (B, num_heads, window_size², dim // num_heads).

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.
    """
    batch, height, width, dim = x.shape
    if dim % num_heads:
        raise ValueError(f"{dim} channels do not divide into {num_heads} heads")
    rows = tap_positions(height, window_size, dilation, x.device)
    columns = tap_positions(width, window_size, dilation, x.device)
    taps = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    split = (batch, *rows.shape, *columns.shape, num_heads, dim // num_heads)
    taps = taps.view(split).permute(0, 5, 2, 4, 1, 3, 6)  # (B, heads, k, k, n_y, n_x, head_dim)
    runs = (batch, num_heads, window_size**2, dim // num_heads, rows.shape[0] * columns.shape[0])
    return taps.reshape(runs).mean(-1)


@checked(least={"size": 0})
def tap_positions(size: int, window_size: int, dilation: int, device: torch.device) -> Tensor:
    """Positions of each window's taps along a side: (windows, window_size)."""
    span = dilation * (window_size - 1) + 1
    starts = torch.arange((size + span - 1) // span, device=device) * span
    positions = starts[:, None] + torch.arange(window_size, device=device) * dilation
    return reflected_positions(positions, size)


class GlobalBranch(nn.Module):
    """Single-head attention to a map downsampled by ``sr_ratio``.

    Query (B, N, dim) and map (B, H, W, dim) → (B, N, dim). Sides below ``sr_ratio`` are padded to
    it by reflection; otherwise, remaining rows and columns are dropped.
    """

    def __init__(self, dim: int, sr_ratio: int) -> None:
        super().__init__()
        self.sr_ratio = sr_ratio
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
        self.norm = nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.local_conv = ConvPosition(dim)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        for axis in (1, 2):
            size = x.shape[axis]
            # With symbolic sizes, both cases are possible; indexing handles both.
            if not statically_known_true(size >= self.sr_ratio):
                positions = torch.arange(larger(size, self.sr_ratio), device=x.device)
                x = x.index_select(axis, reflected_positions(positions, size))
        reduced = self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, h, w, dim)
        key, value = self.kv(self.norm(reduced)).chunk(2, dim=-1)
        value = self.local_conv(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        query, key, value = (t.flatten(1, -2).unsqueeze(1) for t in (query, key, value))
        return softmax_attention(query, key, value).squeeze(1)


class LocalBranch(nn.Module):
    """Multi-head attention to the tokens of :func:`cross_window_fusion`.

    Query (B, heads, N, head_dim) and map (B, H, W, dim) → (B, N, dim).
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, dilation: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.dilation = dilation
        head_dim = dim // num_heads
        self.fc: nn.Module = nn.Linear(head_dim, head_dim)
        self.kv = nn.Linear(head_dim, 2 * head_dim)
        self.local_conv = ConvPosition(dim)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        tokens = cross_window_fusion(x, self.num_heads, self.window_size, self.dilation)
        key, value = self.kv(self.fc(tokens)).chunk(2, dim=-1)  # (B, heads, k², head_dim)
        window = self.window_size, self.window_size
        taps = value.transpose(2, 3).reshape(x.shape[0], x.shape[3], *window)
        value = self.local_conv(taps).reshape(value.transpose(2, 3).shape).transpose(2, 3)
        out = softmax_attention(query, key, value)
        return out.transpose(1, 2).flatten(2)

    def fuse(self) -> nn.Module:
        """Merge the two consecutive linear layers into one."""
        if isinstance(self.fc, nn.Linear):
            self.kv = _chain(self.fc, self.kv)
            self.fc = nn.Identity()
        return self

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dilation={self.dilation}"


class FactorizedAttention(nn.Module):
    """Self-attention in sparse factors: (B, H, W, dim) → (B, H, W, dim).

    An eighth of the channels attends globally, see :class:`GlobalBranch`; the others are divided
    among one :class:`LocalBranch` per dilation. All queries come from one projection. As in the
    published model, the local branches' queries are split by head first and then by branch, keys
    and values the other way round.

    Args:
        dim: channels.
        num_heads: of each local branch; the global one has a single head.
        sr_ratio: downsampling factor of the global branch's map.
        dilations: of the local branches' windows.
        window_size: taps per side of these windows.

    Raises:
        ValueError: ``dim`` is not divisible into these branches and heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        dilations: Sequence[int] = (1,),
        window_size: int = 7,
    ) -> None:
        super().__init__()
        self.global_dim = dim // 8
        self.local_dim = dim - self.global_dim
        if dim % 8 or self.local_dim % (len(dilations) * num_heads):
            raise ValueError(
                f"dim must be a multiple of 8 whose 7/8 divide into {len(dilations)} branches of "
                f"{num_heads} heads, got {dim}"
            )
        self.num_heads = num_heads
        self.group_dim = self.local_dim // len(dilations)
        self.q = nn.Linear(dim, dim)
        self.global_branch = GlobalBranch(self.global_dim, sr_ratio)
        self.kv_dw = nn.Conv2d(self.local_dim, self.local_dim, 3, padding=1, groups=self.local_dim)
        self.kv_pw = nn.Conv2d(self.local_dim, self.local_dim, 1)
        self.local_branches = nn.ModuleList(
            LocalBranch(self.group_dim, num_heads, window_size, d) for d in dilations
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        splits = (self.global_dim, self.local_dim)
        global_query, local_query = self.q(x).flatten(1, 2).split(splits, dim=2)
        global_map, local_map = x.split(splits, dim=3)
        outs = [self.global_branch(global_query, global_map)]
        local_map = self.kv_pw(self.kv_dw(local_map.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        heads = local_query.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, …)
        for branch, query, kv_map in zip(
            self.local_branches,
            heads.split(self.group_dim // self.num_heads, dim=3),
            local_map.split(self.group_dim, dim=3),
            strict=True,
        ):
            outs.append(branch(query, kv_map))
        return self.proj(torch.cat(outs, dim=2)).view(x.shape)


@torch.no_grad()
def _chain(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """A new layer that computes ``second(first(x))``."""
    merged = nn.Linear(
        first.in_features,
        second.out_features,
        device=second.weight.device,
        dtype=second.weight.dtype,
    )
    merged.weight.copy_(second.weight @ first.weight)
    merged.bias.copy_(second(first.bias))
    return merged.requires_grad_(second.weight.requires_grad)
