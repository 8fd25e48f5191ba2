"""Feed-forwards for inference: blocks of tokens go through both layers while in cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from timm.layers import ConvMlp, GluMlp, Mlp
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.dispatch import takes_kernels
from ops.cpu.feed_forward.depthwise_mlp import PackedDepthwiseMlp, depthwise_mlp
from ops.cpu.gemm.linear import pack_weight, unsupported
from ops.cpu.gemm.mlp import packed_mlp
from ops.inference.conv import FastDepthwiseConv2d
from ops.inference.forms import stands_for
from ops.inference.layers import (
    FastLayer,
    FastLinear,
    FastPointwiseConv2d,
    is_quantized,
    tensors_of,
)
from ops.inference.packed_linear import PackedLinear, packed_pair
from ops.mlp import DWMlp

__all__ = [
    "FastConvMlp",
    "FastDWMlp",
    "FastGluMlp",
    "FastMlp",
    "NormedMlp",
    "feed_forward",
]

# Bytes of the hidden map that fit into a core's L2 cache, and the minimum number of rows, below
# which re-reading the weights does not pay off.
_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = 384


def feed_forward(
    x: Tensor,
    expand: Callable[[Tensor], Tensor],
    project: Callable[[Tensor, Tensor | None], Tensor],
    hidden_dim: int,
    residual: Tensor | None = None,
) -> Tensor:
    """``project(expand(x), residual)``, in blocks of rows if the hidden map is large.

    Args:
        x: (..., dim).
        expand: (n, dim) → (n, hidden_dim).
        project: (n, hidden_dim) and, or None, (n, out_dim) to add → (n, out_dim).
        hidden_dim: of the hidden map.
        residual: (..., out_dim), added to the result.

    Returns:
        (..., out_dim).
    """
    if not takes_kernels((x,)):
        return project(expand(x), residual)
    rows = x.numel() // max(1, x.shape[-1])
    chunk = max(_CHUNK_ROWS, _CHUNK_BYTES // (hidden_dim * x.element_size()))
    if rows < 2 * chunk or x.requires_grad:
        return project(expand(x), residual)
    x_rows = x.reshape(rows, -1)
    residuals = None if residual is None else residual.reshape(rows, -1)
    out: Tensor | None = None
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        result = project(expand(x_rows[part]), None if residuals is None else residuals[part])
        if out is None:
            out = result.new_empty(rows, result.shape[-1])
        out[part] = result
    assert out is not None
    return out.view(*x.shape[:-1], -1)


class NormedMlp(FastLayer):
    """``mlp(norm(x)) + residual``: in one pass by our kernel, or layer by layer."""

    kernels: ClassVar = (depthwise_mlp,)

    fc1: Any
    act: Any
    fc2: Any

    def forward(
        self, x: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """Apply ``norm`` and the MLP.

        Args:
            x: (B, ..., dim).
            residual: added to the result.
        """
        packed = self.derived(x)
        if packed is not None and packed.shares_out(x):
            return packed(x, residual, norm)
        return self.in_layers(x if norm is None else norm(x), residual)

    def in_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Without norm, one layer after the other; implemented by subclasses."""
        raise NotImplementedError

    def conv(self) -> nn.Module | None:
        """The layer between the linear layers, if any."""
        return None

    def sources(self) -> list[Tensor]:
        parts = (self.fc1, self.conv(), self.fc2)
        return tensors_of(*(part for part in parts if part is not None))

    def derive(self, x: Tensor) -> PackedDepthwiseMlp | None:
        fc1, conv, fc2 = self.fc1, self.conv(), self.fc2
        if is_quantized(fc1, fc2) and (
            conv is None or policy.depthwise_mlp_by_bytes(fc1.weight.shape[1], x.dtype)
        ):
            return None
        linear = (FastLinear, FastPointwiseConv2d)
        plain = isinstance(fc1, linear) and isinstance(fc2, linear)
        if not plain or not isinstance(self.act, nn.Identity):
            return None
        if conv is None:
            return PackedDepthwiseMlp(fc1, None, fc2, fc1.activation)
        if not isinstance(conv, FastDepthwiseConv2d) or not PackedDepthwiseMlp.takes(conv):
            return None
        return PackedDepthwiseMlp(fc1, conv, fc2, fc1.activation, conv.activation)


@stands_for(Mlp)
class FastMlp(NormedMlp, Mlp):
    """On tokens, (..., dim) → (..., out_dim)."""

    followed: ClassVar = {"act": ("fc1",)}
    needs: ClassVar = {"fc2": FastLinear}
    norm: Any

    def in_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        plain = isinstance(self.norm, nn.Identity) and isinstance(self.act, nn.Identity)
        if plain and is_quantized(self.fc1, self.fc2):
            layers = self.fc1.derived(x), self.fc2.derived(x)
            out = packed_pair(*layers, x, self.fc1.activation, residual)
            if out is not None:
                return out
        return feed_forward(x, self._expand, self.fc2, self.fc1.out_features, residual)

    def _expand(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.fc1(x)))

    def derive(self, x: Tensor) -> PackedDepthwiseMlp | None:
        return super().derive(x) if isinstance(self.norm, nn.Identity) else None


@stands_for(ConvMlp, where=lambda mlp: isinstance(mlp.norm, nn.Identity))
class FastConvMlp(FastLayer, ConvMlp):
    """(B, dim, H, W) → (B, out_dim, H, W), channels-last, without a norm inside."""

    followed: ClassVar = {"act": ("fc1",)}
    needs: ClassVar = {"fc1": FastPointwiseConv2d, "fc2": FastPointwiseConv2d}
    fc1: Any
    act: Any
    fc2: Any

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        shortcut = None if residual is None else residual.permute(0, 2, 3, 1)
        packed = self.derived(x)
        out: Tensor | None = None
        if packed is not None:
            weight1, bias1, weight2, bias2 = packed
            out = packed_mlp(
                tokens, weight1, bias1, weight2, bias2, self.fc1.activation, residual=shortcut
            )
        elif isinstance(self.act, nn.Identity) and is_quantized(self.fc1, self.fc2):
            layers = self.fc1.derived(x), self.fc2.derived(x)
            out = packed_pair(*layers, tokens, self.fc1.activation, shortcut)
        if out is None:
            width = self.fc1.out_channels
            out = feed_forward(tokens, self._expand, self.fc2.on_last, width, shortcut)
        return out.permute(0, 3, 1, 2)

    def _expand(self, x: Tensor) -> Tensor:
        return self.act(self.fc1.on_last(x))

    def sources(self) -> list[Tensor]:
        return tensors_of(self.fc1, self.fc2)

    def derive(self, x: Tensor) -> Any:
        reason = unsupported(x.device, x.dtype, with_bfloat16=True)
        layers = (self.fc1, self.fc2)
        plain = all(isinstance(layer, FastPointwiseConv2d) for layer in layers)
        if reason is not None or not plain or not isinstance(self.act, nn.Identity):
            return None
        if is_quantized(*layers):
            return None
        packed: list[Tensor] = []
        for layer in layers:
            bias = x.new_zeros(layer.out_channels) if layer.bias is None else layer.bias.detach()
            packed += (pack_weight(layer.weight.flatten(1)), bias.float())
        return packed


@stands_for(DWMlp)
class FastDWMlp(NormedMlp, DWMlp):
    """(B, H, W, dim) → (B, H, W, dim)."""

    followed: ClassVar = {"act": ("dwconv",)}
    needs: ClassVar = {"fc2": FastLinear}

    def in_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x), residual)

    def conv(self) -> nn.Module:
        return self.dwconv


def _is_swiglu(mlp: GluMlp) -> bool:
    plain = isinstance(mlp.norm, nn.Identity) and not mlp.gate_last
    return plain and isinstance(mlp.act, nn.SiLU)


@stands_for(GluMlp, where=_is_swiglu)
class FastGluMlp(FastLayer, GluMlp):
    """SwiGLU: activation and product are applied in a linear layer's epilogue."""

    needs: ClassVar = {"fc2": FastLinear}
    fc1: Any
    fc2: Any

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        halves = self.derived(x)
        if halves is None:
            out = GluMlp.forward(self, x)
            return out if residual is None else out + residual
        gate, up = halves
        return self.fc2(gate.times(x, "silu", up(x, "none", None)), residual)

    def sources(self) -> list[Tensor]:
        return tensors_of(self.fc1)

    def derive(self, x: Tensor) -> tuple[PackedLinear, PackedLinear] | None:
        if unsupported(x.device, x.dtype, with_bfloat16=True) is not None:
            return None  # without an epilogue, one product is faster than two
        halves = self.fc1.weight.chunk(2)
        biases = (None, None) if self.fc1.bias is None else self.fc1.bias.chunk(2)
        gate, up = map(PackedLinear, halves, biases)
        return gate, up
