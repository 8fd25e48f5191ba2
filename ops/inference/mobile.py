"""Inference layers of the mobile networks: residual branches and their attention, channels-last."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.attention.cascaded import CascadedGroupAttention, distance_bias, resize_distance_table
from ops.attention.single_head import SingleHeadAttention
from ops.inference.layers import FastLayer
from ops.mobile import ConvFFN, ExpandMerging, Residual

__all__ = [
    "FastCascadedGroupAttention",
    "FastConvFFN",
    "FastExpandMerging",
    "FastResidual",
    "FastSingleHeadAttention",
]


class FastResidual(Residual):
    """``x + fn(x)``, where ``fn`` adds ``x`` in its last layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, residual=x)


class FastConvFFN(ConvFFN):
    """On tokens; ``fc2`` adds the shortcut."""

    followed: ClassVar = {"act": ("fc1",)}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fc1: Any = self.fc1
        fc2: Any = self.fc2
        tokens = x.permute(0, 2, 3, 1)
        shortcut = None if residual is None else residual.permute(0, 2, 3, 1)
        return fc2.on_last(self.act(fc1.on_last(tokens)), shortcut).permute(0, 3, 1, 2)


class FastExpandMerging(ExpandMerging):
    """The convolutions apply the activation."""

    followed: ClassVar = {"act": ("expand", "reduce")}


class FastCascadedGroupAttention(FastLayer, CascadedGroupAttention):
    """On tokens, with the table of biases of each map's size made once."""

    def sources(self) -> list[Tensor]:
        return [self.attention_biases]

    def derive(self, x: Tensor) -> dict[tuple[int, int], Tensor]:
        return {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        biases = self.derived(x)
        height, width = x.shape[2:]
        size = self.window_size
        if biases is None:
            out = super().forward(x)
            return out if residual is None else out + residual
        tokens = x.permute(0, 2, 3, 1)
        if height <= size and width <= size:
            return self.proj(self._mix(tokens, biases).permute(0, 3, 1, 2), residual)
        bottom, right = -height % size, -width % size
        if bottom or right:
            tokens = F.pad(tokens, (0, 0, 0, right, 0, bottom))
        batch, rows, columns, dim = tokens.shape
        split = tokens.view(batch, rows // size, size, columns // size, size, dim).transpose(2, 3)
        mixed = self._mix(split.reshape(-1, size, size, dim), biases)
        mixed = mixed.view(split.shape).transpose(2, 3).reshape(batch, rows, columns, dim)
        return self.proj(mixed[:, :height, :width].permute(0, 3, 1, 2), residual)

    def _mix(self, x: Tensor, biases: dict[tuple[int, int], Tensor]) -> Tensor:
        """All but the projection: (N, h, w, dim) → (N, h, w, dim)."""
        height, width = x.shape[1:3]
        bias = biases.get((height, width))
        if bias is None:
            table = self.attention_biases.unflatten(1, (self.table_size, self.table_size))
            bias = distance_bias(resize_distance_table(table, height, width))
            biases[height, width] = bias
        tokens = x.flatten(1, 2)
        layers: Any = self.heads
        shares = tokens.chunk(len(layers), 2)
        outs: list[Tensor] = []
        for head, (share, layer) in enumerate(zip(shares, layers, strict=True)):
            qkv = layer.qkv.on_last(share + outs[-1] if outs else share)
            query, key, value = qkv.split(layer.splits, dim=2)
            query = query.unflatten(1, (height, width)).permute(0, 3, 1, 2)
            query = layer.dwconv(query).permute(0, 2, 3, 1).flatten(1, 2)
            logits = torch.baddbmm(
                bias[head], query, key.transpose(1, 2), alpha=query.shape[2] ** -0.5
            )
            outs.append(torch.bmm(logits.softmax(dim=-1), value))  # (N, hw, dim / heads)
        return torch.cat(outs, dim=2).relu_().view(x.shape)


class FastSingleHeadAttention(SingleHeadAttention):
    """On tokens."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        attended, rest = x.split(self.input_splits, dim=1)
        qkv = self.qkv(self.norm(attended)).permute(0, 2, 3, 1).flatten(1, 2)
        query, key, value = qkv.split(self.qkv_splits, dim=2)
        logits = torch.bmm(query * query.shape[2] ** -0.5, key.transpose(1, 2))
        attended = torch.bmm(logits.softmax(dim=-1), value).view(batch, height, width, -1)
        mixed = torch.cat((attended, rest.permute(0, 2, 3, 1)), dim=3).relu_()
        return self.proj(mixed.permute(0, 3, 1, 2), residual)
