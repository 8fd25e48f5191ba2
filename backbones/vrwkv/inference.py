"""Inference forms of Vision-RWKV's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from backbones.vrwkv import blocks
from ops.cpu.scan.gated_scan import normed_scan
from ops.cpu.wkv.wkv import bi_wkv_forward, shifted_mixtures
from ops.inference.layers import FastForm, stands_for
from ops.inference.packed_linear import PackedLinear

__all__ = ["VRWKVAttention", "VRWKVGatedScan", "VRWKVMlp"]


@stands_for(blocks.WKVAttention)
class VRWKVAttention(FastForm, blocks.WKVAttention):
    """One kernel for mixing, one for scan and gate."""

    kernels: ClassVar = (bi_wkv_forward,)

    def fast(self, x: Tensor, derived: Tensor) -> Tensor:
        decay, first = self.per_token(x.shape[1] * x.shape[2])
        for_key, for_value, for_gate = shifted_mixtures(x, derived).unbind()
        key, value = self.key(for_key).flatten(1, 2), self.value(for_value).flatten(1, 2)
        gate = None  # of the scan, if no norm is in between
        if isinstance(self.norm, nn.Identity):
            gate = self.receptance(for_gate).flatten(1, 2)
        out = bi_wkv_forward(key, value, decay, first, gate, self.segments).view(x.shape)
        if gate is None:
            out = torch.sigmoid(self.receptance(for_gate)) * self.norm(out)
        return self.proj(out)

    def derive(self, x: Tensor) -> Tensor:
        return _shares(self.mix_k, self.mix_v, self.mix_r)


class _GatedScan(NamedTuple):
    """Weights of the first mixture, vectors in float32, packed layers."""

    shares: Tensor
    of_heads: list[Tensor]  # decay, bonus, the norm's weight and bias
    gate: PackedLinear
    mix_down: PackedLinear
    mix_up: list[PackedLinear]  # of the other five mixtures
    decay_down: PackedLinear
    decay_up: PackedLinear


@stands_for(blocks.GatedScan)
class VRWKVGatedScan(FastForm, blocks.GatedScan):
    """One kernel for scan and norm; layers apply activations, shares of mixtures, and the gate."""

    kernels: ClassVar = (normed_scan, shifted_mixtures)

    def fast(self, x: Tensor, derived: _GatedScan) -> Tensor:
        shape = x.shape
        for_low, shifted = shifted_mixtures(x, derived.shares, self.num_heads).unbind()
        x = x.reshape(-1, shape[-1])
        change = shifted.view(x.shape).sub(x)
        low = derived.mix_down(for_low.view(x.shape), "tanh").chunk(5, dim=-1)
        of_decay, of_key, of_value, of_receptance, of_gate = (
            (x + layer(part, factor=change)).view(shape[0], -1, shape[-1])
            for layer, part in zip(derived.mix_up, low, strict=True)
        )
        query, key, value = (
            self._heads(layer(y))
            for layer, y in (
                (self.receptance, of_receptance),
                (self.key, of_key),
                (self.value, of_value),
            )
        )
        decay = derived.decay_down(of_decay, "tanh")
        decay = self._heads(derived.decay_up(decay))
        out = normed_scan(query, key, value, decay, *derived.of_heads, self.norm.eps).flatten(2)
        return self.proj(derived.gate(of_gate, "silu", factor=out).view(shape))

    def derive(self, x: Tensor) -> _GatedScan | None:
        mixes = (self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g)
        mix_x = self.mix_x.detach().float().flatten()
        vectors = (self.decay, self.first, self.norm.weight, self.norm.bias)
        return _GatedScan(
            torch.stack([1 - mix_x, torch.zeros_like(mix_x)]),
            [t.detach().float().view(self.num_heads, -1) for t in vectors],
            PackedLinear(self.gate.weight, None),
            PackedLinear(self.mix_down.t(), None),
            [
                PackedLinear(weight.t(), mix.flatten())
                for weight, mix in zip(self.mix_up, mixes, strict=True)
            ],
            PackedLinear(self.decay_down.t(), None),
            PackedLinear(self.decay_up.t(), None),
        )


@stands_for(blocks.GatedSquaredMlp)
class VRWKVMlp(FastForm, blocks.GatedSquaredMlp):
    """One kernel for mixing."""

    kernels: ClassVar = (shifted_mixtures,)

    def fast(self, x: Tensor, derived: Tensor) -> Tensor:
        for_key, for_gate = shifted_mixtures(x, derived, self.groups).unbind()
        out = self.value(self.norm(torch.relu(self.key(for_key)).square()))
        return torch.sigmoid(self.receptance(for_gate)) * out

    def derive(self, x: Tensor) -> Tensor:
        return _shares(self.mix_k, self.mix_r)


def _shares(*mixes: Tensor) -> Tensor:
    """The shares of mixtures, one row each."""
    return torch.cat([mix.detach().float().flatten(1) for mix in mixes])
