"""Inference forms of UniRepLKNet's blocks, see :mod:`ops.inference`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from backbones import unireplknet
from ops.cpu import policy
from ops.cpu.feed_forward.response_mlp import PackedResponseMlp, response_mlp
from ops.inference.conv import FastSqueezeExcite
from ops.inference.forms import stands_for
from ops.inference.layers import FastLayer, FastLinear, is_quantized, runs_fast, tensors_of

__all__ = ["UniRepLKNetBlock"]


@stands_for(unireplknet.Block)
class UniRepLKNetBlock(FastLayer, unireplknet.Block):
    """Everything after the depthwise convolution in one pass."""

    followed: ClassVar = {"act": ("fc1",)}
    needs: ClassVar = {"se": FastSqueezeExcite, "fc1": FastLinear, "fc2": FastLinear}
    kernels: ClassVar = (response_mlp,)

    def forward(self, x: Tensor) -> Tensor:
        if not runs_fast(x, self.fc1.weight):
            return super().forward(x)
        derived = self.derived(x)
        mixed, shortcut = self.dwconv(x).permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        if derived is None:
            return self._mlp(mixed, shortcut).permute(0, 3, 1, 2)
        return derived(mixed, shortcut).permute(0, 3, 1, 2)

    def _mlp(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Gates, response norm and shortcut are applied by the linear layers."""
        se: Any = self.se
        fc1: Any = self.fc1
        hidden, energy = fc1.energy(x, se.gates(x.permute(0, 3, 1, 2)))
        norm = energy.sqrt()
        share = norm / (norm.mean(dim=-1, keepdim=True) + self.grn.eps)
        return self.fc2(hidden, shortcut, 1 + self.grn.weight.view(1, -1) * share)

    def sources(self) -> list[Tensor]:
        layers = (self.fc1, self.fc2, self.se.fc1, self.se.fc2)
        return [*tensors_of(*layers), self.grn.weight]

    def derive(self, x: Tensor) -> PackedResponseMlp | None:
        se = self.se
        layers: tuple[Any, Any] = (self.fc1, self.fc2)
        in_bytes: list[Any] = [None, None]
        if is_quantized(*layers) and policy.response_mlp_by_bytes(self.fc1.in_features):
            in_bytes = [layer.in_bytes(x) for layer in layers]
        return PackedResponseMlp(se.fc1, se.fc2, *layers, self.grn.weight, self.grn.eps, in_bytes)
