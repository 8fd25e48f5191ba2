"""Inference forms of convolutional families' blocks, see :mod:`ops.inference`: fewer passes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from backbones import inception_next, unireplknet, van

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


FORMS: dict[type[Any], type[Any]] = {
    inception_next.Block: InceptionNeXtBlock,
    unireplknet.Block: UniRepLKNetBlock,
    van.Attention: VANAttention,
    van.Block: VANBlock,
    van.ConvMlp: VANConvMlp,
}
