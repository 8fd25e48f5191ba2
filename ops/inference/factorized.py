"""FaViT's attention for inference: cached tap positions, all branches written to one map."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ops.attention.factorized import FactorizedAttention, GlobalBranch, LocalBranch, tap_positions
from ops.cpu import policy
from ops.cpu.attention.grouped import attend, grouped_attention
from ops.inference.layers import FastLayer, fast_path_applies, stands_for
from ops.inference.packed_linear import PackedLinear

__all__ = ["FastFactorizedAttention", "FastGlobalBranch", "FastLocalBranch"]


@stands_for(GlobalBranch)
class FastGlobalBranch(FastLayer, GlobalBranch):
    """Computes only keys and values; non-overlapping patches go through a linear layer."""

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, dim), no side below ``sr_ratio`` → (B, h·w, 1, dim) each."""
        packed = self.derived(x)
        if packed is None:
            reduced = self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            side = self.sr_ratio
            height, width = x.shape[1] // side, x.shape[2] // side
            whole = x[:, : height * side, : width * side]
            patches = whole.unflatten(2, (width, side)).unflatten(1, (height, side))
            reduced = packed(patches.transpose(2, 3).flatten(3))
        key, value = self.kv(self.norm(reduced)).chunk(2, dim=-1)
        value = self.local_conv(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return key.flatten(1, 2).unsqueeze(2), value.flatten(1, 2).unsqueeze(2)

    def derive(self, x: Tensor) -> PackedLinear:
        return PackedLinear(self.sr.weight.permute(0, 2, 3, 1).flatten(1), self.sr.bias)


@stands_for(LocalBranch)
class FastLocalBranch(FastLayer, LocalBranch):
    """Only its keys and values; for few windows, the linear layer includes the average."""

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, dim) → (B, window_size², heads, head_dim) each."""
        batch, height, width, dim = x.shape
        heads, side = self.num_heads, self.window_size
        taps = x.flatten(1, 2).index_select(1, _taps(height, width, side, self.dilation))
        taps = taps.view(batch, side**2, -1, heads, dim // heads)
        # See ops.attention.factorized.cross_window_fusion.
        sequence = taps.transpose(2, 3).flatten(3)  # (B, side², heads, windows · head_dim)
        key, value = self._keys_and_values_of(sequence).chunk(2, dim=-1)
        value_map = value.reshape(batch, side, side, dim).permute(0, 3, 1, 2)
        value = self.local_conv(value_map).permute(0, 2, 3, 1).reshape(value.shape)
        return key, value

    def _keys_and_values_of(self, sequence: Tensor) -> Tensor:
        """(B, side², heads, windows · head_dim) → (B, side², heads, 2 · head_dim)."""
        windows = sequence.shape[3] // self.kv.in_features
        packed = self.derived(sequence)
        if windows == 1:
            return self.kv(self.fc(sequence))
        if packed is None or not policy.averages_in_linear(sequence.shape[3]):
            return self.kv(self.fc(sequence.unflatten(3, (-1, windows)).mean(-1)))
        if windows not in packed:
            weight = self.kv.weight.detach().repeat_interleave(windows, dim=1) / windows
            packed[windows] = PackedLinear(weight, self.kv.bias)
        return packed[windows](sequence)

    def derive(self, x: Tensor) -> dict[int, PackedLinear] | None:
        """Layers by number of windows; created on first use."""
        return {} if isinstance(self.fc, nn.Identity) else None


@stands_for(FactorizedAttention)
class FastFactorizedAttention(FactorizedAttention):
    """Every branch writes its channels of a shared map."""

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.global_branch, *self.local_branches)
        fast = (
            fast_path_applies(x, self.q.weight)
            and grouped_attention.unavailable(x.device, x.dtype) is None
        )
        if not fast or min(x.shape[1:3]) < self.global_branch.sr_ratio or x.shape[0] == 0:
            return super().forward(x)
        splits = (self.global_dim, self.local_dim)
        queries = self.q(x).flatten(1, 2)
        mixed = torch.empty_like(queries)
        global_map, local_map = x.split(splits, dim=3)
        local_map = self.kv_pw(self.kv_dw(local_map.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        global_query, local_query = queries.split(splits, dim=2)
        outs = mixed.split((self.global_dim, *[self.group_dim] * len(self.local_branches)), dim=2)
        heads, width = self.num_heads, self.group_dim // self.num_heads
        parts = (
            global_query.unsqueeze(2),
            *local_query.unflatten(2, (heads, -1)).split(width, dim=3),
        )
        maps = (global_map, *local_map.split(self.group_dim, dim=3))
        for branch, query, part, out in zip(branches, parts, maps, outs, strict=True):
            assert isinstance(branch, FastGlobalBranch | FastLocalBranch)
            key, value = branch.keys_and_values(part)
            attend(query, key, value, out.unflatten(2, (query.shape[2], -1)))
        return self.proj(mixed.view(x.shape))


@functools.lru_cache(maxsize=64)
def _taps(height: int, width: int, window_size: int, dilation: int) -> Tensor:
    """The pixel of each tap of each window, taps first: (window_size² · windows,)."""
    cpu = torch.device("cpu")
    rows = tap_positions(height, window_size, dilation, cpu)
    columns = tap_positions(width, window_size, dilation, cpu)
    # (k, k, n_y, n_x)
    pixels = rows.t()[:, None, :, None] * width + columns.t()[None, :, None, :]
    return pixels.flatten()
