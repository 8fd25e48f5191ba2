"""The blocks of ViG: bidirectional gated linear attention, and a gated MLP.

Bencheng Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
https://arxiv.org/abs/2405.18425.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import GluMlp
from torch import Tensor, nn

from ops.cpu.scan.gated_scan import mixed_scan
from ops.inference.layers import FastForm, stands_for
from ops.linear_attention import gated_linear_attention
from ops.norm import RMSNorm

_GATE_RANK = 16
HEAD_NORM_EPS = 1e-6
GATE_DIVISOR = 16  # of log gates, so that they start near 0 (slow decay)


class Mixing(nn.Module):
    """The norms, activation and mixing of :class:`GatedLinearAttention`."""

    num_heads: int
    norm: Any
    local_norm: Any
    out_act: nn.Module

    def mix(self, scanned: Tensor, gate: Tensor, x: Tensor) -> Tensor:
        """The gated mixture of the scan's output (B, L, heads, V) and the map, both normalised."""
        gate, local = (_heads(t.flatten(1, 2), self.num_heads) for t in (gate.sigmoid(), x))
        mixed = gate * self.norm(scanned) + (1 - gate) * self.local_norm(local)
        return self.out_act(mixed.reshape(x.shape))


class GatedLinearAttention(Mixing):
    """Bidirectional scan of a map, mixed with a convolution of the map by gates.

    (B, H, W, dim) → (B, H, W, dim). Keys and queries have half the channels. See
    :func:`ops.linear_attention.gated_linear_attention`.

    Args:
        act: SiLU after the convolution and before the last projection.
        eval_share: factor of the sum of both directions in eval mode; in training it is 1/2.
    """

    def __init__(
        self, dim: int, num_heads: int, act: bool = False, eval_share: float = 0.5
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"2 · num_heads must divide dim {dim}, got num_heads {num_heads}")
        self.num_heads, self.eval_share = num_heads, eval_share
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.act = nn.SiLU() if act else nn.Identity()
        self.out_act = nn.SiLU() if act else nn.Identity()
        self.qkv = nn.Linear(dim, 2 * dim, bias=False)
        self.decay_down = nn.Linear(dim, _GATE_RANK, bias=False)
        self.decay_up = nn.Linear(_GATE_RANK, dim)
        self.gate = nn.Linear(dim, dim)
        self.norm = RMSNorm(dim // num_heads, eps=HEAD_NORM_EPS)
        self.local_norm = RMSNorm(dim // num_heads, eps=HEAD_NORM_EPS)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dwconv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        share = 0.5 if self.training else self.eval_share
        query, key, value = self.qkv(x).split(_widths(x)[:3], dim=-1)
        decay = self.decay_up(self.decay_down(x))
        scale = share * (x.shape[-1] // 2 // self.num_heads) ** -0.5
        scanned = _scan(query, key, value, decay, self.num_heads, scale)
        return self.proj(self.mix(scanned, self.gate(x), x))

    def fuse(self) -> JoinedAttention:
        """Merges the first projections of the map into one layer."""
        return JoinedAttention(self)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, eval_share={self.eval_share}"


class JoinedAttention(Mixing):
    """:class:`GatedLinearAttention` in eval mode with merged projections.

    (B, H, W, dim) → (B, H, W, dim). The scale of the scan is folded into the query's weights.
    """

    @torch.no_grad()
    def __init__(self, attn: GatedLinearAttention) -> None:
        super().__init__()
        self.num_heads = attn.num_heads
        self.dwconv, self.act, self.out_act = attn.dwconv, attn.act, attn.out_act
        parts = (attn.qkv, attn.gate, attn.decay_down)
        dim = attn.qkv.in_features
        self.joined = nn.Linear(dim, sum(part.out_features for part in parts))
        self.joined.to(attn.qkv.weight)
        self.joined.weight.copy_(torch.cat([part.weight for part in parts]))
        self.joined.weight[: dim // 2] *= attn.eval_share * (dim // 2 // self.num_heads) ** -0.5
        self.joined.bias.zero_()[2 * dim : 3 * dim] = attn.gate.bias
        self.decay_up = attn.decay_up
        self.norm, self.local_norm, self.proj = attn.norm, attn.local_norm, attn.proj

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dwconv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        query, key, value, gate, decay = self.joined(x).split(_widths(x), dim=-1)
        scanned = _scan(query, key, value, self.decay_up(decay), self.num_heads, 1.0)
        return self.proj(self.mix(scanned, gate, x))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


@stands_for(JoinedAttention)
class ViGAttention(FastForm, JoinedAttention):
    """The inference form: one kernel from the input projections to the last projection."""

    kernels: ClassVar = (mixed_scan,)

    def fast(self, x: Tensor, derived: tuple[Any, ...]) -> Tensor:
        x = self.act(self.dwconv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        shape, x = x.shape, x.flatten(1, 2)
        joined = self.joined(x)
        decay = self.decay_up(joined[..., 3 * shape[-1] :])
        mixed = mixed_scan(joined, decay, x, *derived)
        return self.proj(mixed.view(shape))

    def derive(self, x: Tensor) -> tuple[Any, ...] | None:
        weights = (norm.weight.detach().float() for norm in (self.norm, self.local_norm))
        act = "silu" if isinstance(self.out_act, nn.SiLU) else "none"
        return (*weights, self.num_heads, HEAD_NORM_EPS, act)


def _widths(x: Tensor) -> list[int]:
    """Channels of query, key, value, gate, and of the decays' input."""
    dim = x.shape[-1]
    return [dim // 2, dim // 2, dim, dim, _GATE_RANK]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, C) → (B, L, heads, C / heads)"""
    return x.unflatten(-1, (num_heads, -1))


def _scan(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, num_heads: int, scale: float
) -> Tensor:
    """Scan maps (B, H, W, ·) in row-major order, forward and backward: (B, L, heads, V).

    ``decay`` has the logits of both directions' gates.
    """
    # Half precision is not accurate enough.
    exact = torch.promote_types(decay.dtype, torch.float32)
    log_gate = F.logsigmoid(decay.to(exact)) / GATE_DIVISOR
    query, key, value, ahead, back = (
        _heads(t.flatten(1, 2), num_heads) for t in (query, key, value, *log_gate.chunk(2, -1))
    )
    return gated_linear_attention(query, key, value, ahead, back, scale=scale)


def gated_mlp(dim: int, hidden_dim: int, drop: float) -> nn.Module:
    """Two linear layers, of which one gates the other by SiLU, and a third."""
    return GluMlp(dim, 2 * hidden_dim, act_layer=nn.SiLU, bias=False, drop=drop, gate_last=False)
