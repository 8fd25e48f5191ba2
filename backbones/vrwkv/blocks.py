"""The blocks of Vision-RWKV: bidirectional scans and gated feed-forwards.

Yuchen Duan et al., "Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like
Architectures", https://arxiv.org/abs/2403.02308; :mod:`backbones.vrwkv` has the networks.

The input of each projection is a learned interpolation between a pixel and its neighbours
(:func:`shift`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from ops.bi_wkv import bi_wkv
from ops.block import PreNormBlock
from ops.cpu.scan.gated_scan import normed_scan
from ops.cpu.wkv.wkv import bi_wkv_forward, shifted_mixtures
from ops.inference.layers import FastForm, stands_for
from ops.linear_attention import gated_linear_attention

HEAD_DIM = 64  # of a head of VRWKV6
_MIX_RANK = 32  # rank of VRWKV6's predicted mixing weights
_DECAY_RANK = 64


def shift(x: Tensor, groups: int = 1) -> Tensor:
    """Shift a quarter of the channels each from the left, right, upper and lower neighbour.

    (B, H, W, C) → (B, H, W, C), with zero padding; ``groups`` of channels are quartered separately.
    """
    left, right, up, down = x.unflatten(-1, (groups, 4, -1)).unbind(-2)
    none = (0, 0)
    shifted = (
        F.pad(left[:, :, :-1], (*none, *none, 1, 0)),
        F.pad(right[:, :, 1:], (*none, *none, 0, 1)),
        F.pad(up[:, :-1], (*none, *none, *none, 1, 0)),
        F.pad(down[:, 1:], (*none, *none, *none, 0, 1)),
    )
    return torch.stack(shifted, -2).flatten(-3)


def _mix_weight(dim: int) -> nn.Parameter:
    """The weight of a pixel's own value in a mixture, by channel."""
    return nn.Parameter(torch.full((1, 1, dim), 0.5))


class WKVAttention(nn.Module):
    """Bi-WKV attention with a gate.

    (B, H, W, dim) → (B, H, W, dim). See :func:`ops.bi_wkv.bi_wkv`; with 0 ``segments``, it is the
    paper's formula. Decay and bonus are divided by the number of tokens, so outputs depend on the
    size of the map, by design.
    """

    def __init__(self, dim: int, segments: int, norm: bool = False) -> None:
        super().__init__()
        self.segments = segments
        self.decay = nn.Parameter(torch.zeros(dim))
        self.first = nn.Parameter(torch.zeros(dim))
        self.mix_k, self.mix_v, self.mix_r = _mix_weight(dim), _mix_weight(dim), _mix_weight(dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=1e-5) if norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shifted = shift(x)
        change = x - shifted
        key = self.key(shifted + change * self.mix_k)
        value = self.value(shifted + change * self.mix_v)
        receptance = self.receptance(shifted + change * self.mix_r)
        decay, first = self.per_token(x.shape[1] * x.shape[2])
        scanned = bi_wkv(
            key.flatten(1, 2), value.flatten(1, 2), decay, first, self.segments or None
        )
        return self.proj(receptance.sigmoid() * self.norm(scanned.view(key.shape)))

    def per_token(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The scan's ``decay`` and ``first``, in float32 or wider."""
        exact = torch.promote_types(self.decay.dtype, torch.float32)
        return self.decay.to(exact) / tokens, self.first.to(exact) / tokens

    def extra_repr(self) -> str:
        return f"segments={self.segments}"

    @torch.no_grad()
    def init_weights(self, layer: int, depth: int) -> None:
        """The published initialisation, which depends on layer and channel."""
        dim = len(self.decay)
        channel = torch.arange(dim)
        begun, left = layer / max(1, depth - 1), 1 - layer / depth
        position = channel / max(1, dim - 1)
        self.decay.copy_(-5 + 8 * position ** (0.7 + 1.3 * begun))
        self.first.copy_(0.3 + 0.5 * ((channel + 1) % 3 - 1))
        self.mix_k.copy_((channel / dim) ** left)
        self.mix_v.copy_((channel / dim) ** left + 0.3 * begun)
        self.mix_r.copy_((channel / dim) ** (0.5 * left))


@stands_for(WKVAttention)
class VRWKVAttention(FastForm, WKVAttention):
    """The inference form: one kernel for mixing, one for scan and gate."""

    kernels: ClassVar = (bi_wkv_forward,)

    def fast(self, x: Tensor, derived: tuple[()]) -> Tensor:
        decay, first = self.per_token(x.shape[1] * x.shape[2])
        shares = _shares(self.mix_k, self.mix_v, self.mix_r)
        for_key, for_value, for_gate = shifted_mixtures(x, shares).unbind()
        key, value = self.key(for_key).flatten(1, 2), self.value(for_value).flatten(1, 2)
        gate = None  # of the scan, if no norm is in between
        if isinstance(self.norm, nn.Identity):
            gate = self.receptance(for_gate).flatten(1, 2)
        out = bi_wkv_forward(key, value, decay, first, gate, self.segments).view(x.shape)
        if gate is None:
            out = torch.sigmoid(self.receptance(for_gate)) * self.norm(out)
        return self.proj(out)


class GatedScan(nn.Module):
    """VRWKV6: bidirectional linear attention with token-dependent mixing and decays.

    (B, H, W, dim) → (B, H, W, dim). See :func:`ops.linear_attention.gated_linear_attention`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = dim // HEAD_DIM
        self.mix_x = _mix_weight(dim)
        self.mix_w, self.mix_k, self.mix_v = _mix_weight(dim), _mix_weight(dim), _mix_weight(dim)
        self.mix_r, self.mix_g = _mix_weight(dim), _mix_weight(dim)
        self.mix_down = nn.Parameter(torch.zeros(dim, 5 * _MIX_RANK))
        self.mix_up = nn.Parameter(torch.zeros(5, _MIX_RANK, dim))
        self.decay = nn.Parameter(torch.zeros(1, 1, dim))
        self.decay_down = nn.Parameter(torch.zeros(dim, _DECAY_RANK))
        self.decay_up = nn.Parameter(torch.zeros(_DECAY_RANK, dim))
        self.first = nn.Parameter(torch.zeros(self.num_heads, HEAD_DIM))
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.norm = nn.GroupNorm(self.num_heads, dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        change = (shift(x, self.num_heads) - x).flatten(1, 2)
        x = x.flatten(1, 2)
        low = torch.tanh((x + change * self.mix_x) @ self.mix_down)
        shares = torch.einsum("blgr,grc->gblc", low.unflatten(-1, (5, _MIX_RANK)), self.mix_up)
        of_decay, of_key, of_value, of_receptance, of_gate = (
            x + change * (own + share)
            for own, share in zip(
                (self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g), shares, strict=True
            )
        )
        projected = self.receptance(of_receptance), self.key(of_key), self.value(of_value)
        query, key, value = map(self._heads, projected)
        # Half precision is not accurate enough.
        exact = torch.promote_types(query.dtype, torch.float32)
        decay = self.decay.to(exact) + torch.tanh(of_decay @ self.decay_down) @ self.decay_up
        log_gate = self._heads(-decay.to(exact).exp())
        bonus = self.first.to(exact)
        out = gated_linear_attention(query, key, value, log_gate, log_gate, bonus, scale=1.0)
        normed = self.norm(out.flatten(0, 1).flatten(1)).view(x.shape)
        return self.proj(normed * F.silu(self.gate(of_gate))).view(shape)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, HEAD_DIM))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    @torch.no_grad()
    def init_weights(self, layer: int, depth: int) -> None:
        """The published initialisation, which depends on layer and channel."""
        dim = self.decay.shape[-1]
        channel = torch.arange(dim)
        begun, left = layer / max(1, depth - 1), 1 - layer / depth
        position = channel / max(1, dim - 1)
        own = 1 - (channel / dim) ** left
        for mix in (self.mix_x, self.mix_w, self.mix_k):
            mix.copy_(own)
        self.mix_v.copy_(own - 0.3 * begun)
        for mix in (self.mix_r, self.mix_g):
            mix.copy_(1 - (channel / dim) ** (0.5 * left))
        for matrix in (self.mix_down, self.mix_up, self.decay_down, self.decay_up):
            matrix.uniform_(-1e-4, 1e-4)
        self.decay.copy_(-6 + 5 * position ** (0.7 + 1.3 * begun))
        first = begun * (1 - position) + 0.1 * ((channel + 1) % 3 - 1)
        self.first.copy_(first.view_as(self.first))


@stands_for(GatedScan)
class VRWKVGatedScan(FastForm, GatedScan):
    """The inference form: one kernel for scan and norm.

    Layers apply activations, shares of mixtures, and the gate.
    """

    kernels: ClassVar = (normed_scan, shifted_mixtures)

    def fast(self, x: Tensor, derived: tuple[()]) -> Tensor:
        shape = x.shape
        mix_x = self.mix_x.float().flatten()
        shares = torch.stack([1 - mix_x, torch.zeros_like(mix_x)])
        for_low, shifted = shifted_mixtures(x, shares, self.num_heads).unbind()
        x = x.reshape(-1, shape[-1])
        change = shifted.view(x.shape).sub(x)
        low = torch.tanh(for_low.view(x.shape) @ self.mix_down).chunk(5, dim=-1)
        mixes = (self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g)
        of_decay, of_key, of_value, of_receptance, of_gate = (
            (x + F.linear(part, up.t(), own.flatten()) * change).view(shape[0], -1, shape[-1])
            for part, up, own in zip(low, self.mix_up, mixes, strict=True)
        )
        projected = self.receptance(of_receptance), self.key(of_key), self.value(of_value)
        query, key, value = map(self._heads, projected)
        decay = self._heads(torch.tanh(of_decay @ self.decay_down) @ self.decay_up)
        vectors = (self.decay, self.first, self.norm.weight, self.norm.bias)
        of_heads = [t.float().view(self.num_heads, -1) for t in vectors]
        out = normed_scan(query, key, value, decay, *of_heads, self.norm.eps).flatten(2)
        gate = F.silu(F.linear(of_gate, self.gate.weight.detach()))  # detached: never in int8
        return self.proj((gate * out).view(shape))


class GatedSquaredMlp(nn.Module):
    """A feed-forward with a squared ReLU, times a gate: (B, H, W, dim) → (B, H, W, dim).

    ``groups`` are those of :func:`shift`; ``norm`` and ``drop`` follow the squared ReLU.
    """

    def __init__(
        self, dim: int, hidden_dim: int, groups: int = 1, norm: bool = False, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.groups = groups
        self.mix_k, self.mix_r = _mix_weight(dim), _mix_weight(dim)
        self.key = nn.Linear(dim, hidden_dim, bias=False)
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-5) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shifted = shift(x, self.groups)
        change = x - shifted
        hidden = self.key(shifted + change * self.mix_k).relu().square()
        out = self.value(self.drop(self.norm(hidden)))
        return self.receptance(shifted + change * self.mix_r).sigmoid() * out

    @torch.no_grad()
    def init_weights(self, layer: int, depth: int) -> None:
        """The published initialisation."""
        dim = self.mix_k.shape[-1]
        for mix in (self.mix_k, self.mix_r):
            mix.copy_((torch.arange(dim) / dim) ** (1 - layer / depth))


@stands_for(GatedSquaredMlp)
class VRWKVMlp(FastForm, GatedSquaredMlp):
    """The inference form: one kernel for mixing."""

    kernels: ClassVar = (shifted_mixtures,)

    def fast(self, x: Tensor, derived: tuple[()]) -> Tensor:
        shares = _shares(self.mix_k, self.mix_r)
        for_key, for_gate = shifted_mixtures(x, shares, self.groups).unbind()
        out = self.value(self.norm(torch.relu(self.key(for_key)).square()))
        return torch.sigmoid(self.receptance(for_gate)) * out


def _shares(*mixes: Tensor) -> Tensor:
    """The shares of mixtures, one row each."""
    return torch.cat([mix.detach().float().flatten(1) for mix in mixes])


class Block(PreNormBlock):
    """Residual attention and feed-forward: (B, H, W, dim) → (B, H, W, dim).

    Args:
        post_norm: normalise the outputs of both instead of their inputs.
        layer_scale: initial value of the layer scales; None for none.
    """

    def __init__(
        self,
        dim: int,
        attn: WKVAttention | GatedScan,
        mlp: GatedSquaredMlp,
        post_norm: bool,
        layer_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__(dim, attn, mlp, nn.LayerNorm, drop_path, layer_scale)
        self.post_norm = post_norm

    def forward(self, x: Tensor) -> Tensor:
        if not self.post_norm:
            return super().forward(x)
        x = x + self.drop_path(self.ls1(self.norm1(self.attn(x))))
        return x + self.drop_path(self.ls2(self.norm2(self.mlp(x))))

    @torch.no_grad()
    def fuse(self) -> Block:
        """Fold layer scales into the preceding layers, in place."""
        for norm, last, name in (
            (self.norm1, self.attn.proj, "ls1"),
            (self.norm2, self.mlp.value, "ls2"),
        ):
            scale = getattr(self, name)
            if isinstance(scale, LayerScale):
                if self.post_norm:
                    norm.weight.mul_(scale.gamma)
                    norm.bias.mul_(scale.gamma)
                else:
                    last.weight.mul_(scale.gamma[:, None])
                setattr(self, name, nn.Identity())
        return self

    def extra_repr(self) -> str:
        return f"post_norm={self.post_norm}"
