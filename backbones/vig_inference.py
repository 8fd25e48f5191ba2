"""Inference forms of ViG's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from backbones import vig, vig_blocks
from ops.cpu.scan.gated_scan import mixed_scan
from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer, FastLinear
from ops.inference.mlp import FastGluMlp

__all__ = ["ViGAttention", "ViGBlock", "ViGStem"]


@stands_for(vig.Stem)
class ViGStem(vig.Stem):
    """The first norm applies the activation after it."""

    followed: ClassVar = {"act": ("norm1",)}


@stands_for(vig_blocks.JoinedAttention)
class ViGAttention(FastLayer, vig_blocks.JoinedAttention):
    """One kernel from the input projections to the last projection, which adds the shortcut."""

    followed: ClassVar = {"act": ("dwconv",)}
    needs: ClassVar = {"joined": FastLinear, "decay_up": FastLinear, "proj": FastLinear}
    kernels: ClassVar = (mixed_scan,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        norms = self.derived(x)
        if norms is None:
            out = vig_blocks.JoinedAttention.forward(self, x)
            return out if residual is None else out + residual
        x = self.act(self.dwconv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        shape, x = x.shape, x.flatten(1, 2)
        joined = self.joined(x)
        decay = self.decay_up(joined[..., 3 * shape[-1] :])
        mixed = mixed_scan(joined, decay, x, *norms)
        return self.proj(mixed.view(shape), residual)

    def sources(self) -> list[Tensor]:
        return [self.norm.weight, self.local_norm.weight]

    def derive(self, x: Tensor) -> tuple[Any, ...] | None:
        weights = (norm.weight.detach().float() for norm in (self.norm, self.local_norm))
        act = "silu" if isinstance(self.out_act, nn.SiLU) else "none"
        return (*weights, self.num_heads, vig_blocks.HEAD_NORM_EPS, act)


@stands_for(vig_blocks.Block)
class ViGBlock(vig_blocks.Block):
    """Attention and MLP add their shortcuts."""

    needs: ClassVar = {"attn": ViGAttention, "mlp": FastGluMlp}

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), x)
        return self.mlp(self.norm2(x), x)
