"""Inference forms of the families' blocks, see :mod:`ops.inference`: fewer passes over the maps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import biformer, favit, inception_next, litv2, medvitv2, ravlt, unireplknet, van
from ops.inference.layers import runs_fast

__all__ = ["FORMS"]

# Of a map between two linear layers; a batch whose maps take more goes image by image.
_BATCH_BYTES = 4 << 20


class InceptionNeXtBlock(inception_next.Block):
    """The MLP adds the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.token_mixer(x), residual=x)


class UniRepLKNetBlock(unireplknet.Block):
    """Gates, response norm and shortcut on the way through the linear layers."""

    followed: ClassVar = {"act": ("fc1",)}

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.dwconv(x)
        se: Any = self.se
        gates = se.gates(mixed)
        tokens, shortcut = mixed.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        hidden_bytes = tokens.numel() // tokens.shape[3] * self.fc1.out_features * x.element_size()
        if torch.compiler.is_compiling() or x.requires_grad or hidden_bytes <= _BATCH_BYTES:
            return self._mlp(tokens, gates, shortcut).permute(0, 3, 1, 2)
        out = shortcut.new_empty(shortcut.shape)
        for i in range(len(x)):
            part = slice(i, i + 1)
            out[part] = self._mlp(tokens[part], gates[part], shortcut[part])
        return out.permute(0, 3, 1, 2)

    def _mlp(self, x: Tensor, gates: Tensor, shortcut: Tensor) -> Tensor:
        """(B, H, W, dim), (B, dim) and (B, H, W, dim) → (B, H, W, dim)."""
        fc1: Any = self.fc1
        hidden, energy = fc1.energy(x, gates)
        norm = energy.sqrt()
        share = norm / (norm.mean(dim=-1, keepdim=True) + self.grn.eps)
        return self.fc2(hidden, shortcut, 1 + self.grn.weight.view(1, -1) * share)


class VANAttention(van.Attention):
    """The last projection adds the shortcut."""

    followed: ClassVar = {"act": ("proj_in",)}

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.lka(self.act(self.proj_in(x))), x)


class VANConvMlp(van.ConvMlp):
    """The depthwise convolution applies the activation, the last layer adds the shortcut."""

    followed: ClassVar = {"act": ("dwconv",)}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))), residual)


class VANBlock(van.Block):
    """Scale and addition of the attention in one pass; the MLP adds its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.attn(self.norm1(x)), self.ls1.gamma.view(1, -1, 1, 1))
        return self.mlp(x, x)


class BiFormerGlobalAttention(biformer.GlobalAttention):
    """The projection adds the shortcut."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x)
        heads = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))  # (B, HW, 3, heads, d)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(query, key, value)  # (B, heads, HW, d)
        out = out.transpose(1, 2).reshape(x.shape)
        source = qkv.chunk(3, dim=-1)[2] if self.lepe_on_value else x
        out = out + self.lepe(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out, residual)


class BiFormerBlock(biformer.Block):
    """Attention and MLP add their shortcuts."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x).permute(0, 2, 3, 1)
        x = self.attn(self.norm1(x), x)
        return self.mlp(self.norm2(x), x).permute(0, 3, 1, 2)


class LITv2Block(litv2.Block):
    """The MLP adds its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        if self.norm1 is not None and self.attn is not None:
            x = x + self.attn(self.norm1(x))
        return self.mlp(self.norm2(x), x)


class FaViTBlock(favit.Block):
    """The MLP adds its shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return self.mlp(self.norm2(x), x)


class RAVLTConvMlp(ravlt.ConvMlp):
    """The last layer adds the shortcut."""

    followed: ClassVar = {"act": ("fc1",)}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = self.act(self.fc1(x)).permute(0, 3, 1, 2)
        return self.fc2(self.dwconv(x).permute(0, 2, 3, 1), residual)


class RAVLTBlock(ravlt.Block):
    """Attention and MLP add their shortcuts."""

    def forward(self, x: Tensor, sin: Tensor | None, cos: Tensor | None) -> Tensor:
        x = self.pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        rotary = None if sin is None or cos is None else (sin, cos)
        x = self.attn(self.norm1(x), rotary, x)
        return self.mlp(self.norm2(x), x)


class RAVLTStage(ravlt.RAVLTStage):
    """Without the table of rotations where the attention keeps its own."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fast(x, next(self.parameters())):
            return super().forward(x)
        x = self.downsample(x).permute(0, 2, 3, 1)
        return self.run_blocks(x, None, None).permute(0, 3, 1, 2)


class MedViTV2ConvFFN(medvitv2.ConvFFN):
    """The last layer adds the shortcut."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.project(self.se(self.dwconv(self.expand(x))), residual)


class MedViTV2LocalBlock(medvitv2.LocalBlock):
    """The feed-forward adds both of its shortcuts."""

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        mixed = self.attn(self.norm1(x).reshape(batch, height, width, dim))
        x = x + mixed.reshape(x.shape)
        normed = self.norm2(x)
        return self.ffn(normed, x + normed)


FORMS: dict[type[Any], type[Any]] = {
    biformer.Block: BiFormerBlock,
    biformer.GlobalAttention: BiFormerGlobalAttention,
    favit.Block: FaViTBlock,
    inception_next.Block: InceptionNeXtBlock,
    litv2.Block: LITv2Block,
    medvitv2.ConvFFN: MedViTV2ConvFFN,
    medvitv2.LocalBlock: MedViTV2LocalBlock,
    ravlt.Block: RAVLTBlock,
    ravlt.ConvMlp: RAVLTConvMlp,
    ravlt.RAVLTStage: RAVLTStage,
    unireplknet.Block: UniRepLKNetBlock,
    van.Attention: VANAttention,
    van.Block: VANBlock,
    van.ConvMlp: VANConvMlp,
}
