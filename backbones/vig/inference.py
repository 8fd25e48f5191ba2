"""The inference form of ViG's attention, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from backbones.vig import blocks
from ops.cpu.scan.gated_scan import mixed_scan
from ops.inference.layers import FastForm, stands_for

__all__ = ["ViGAttention"]


@stands_for(blocks.JoinedAttention)
class ViGAttention(FastForm, blocks.JoinedAttention):
    """One kernel from the input projections to the last projection."""

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
        return (*weights, self.num_heads, blocks.HEAD_NORM_EPS, act)
