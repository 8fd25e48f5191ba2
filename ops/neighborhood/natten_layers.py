"""Neighborhood attention layers with the constructors of NATTEN 0.14 and of 0.17 to 0.19.

https://arxiv.org/abs/2204.07143. The parameters have the same names in all versions: ``qkv``,
``rpb``, ``proj``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ops.neighborhood.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    _NeighborhoodAttention,
)
from ops.neighborhood.split import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk


class _WithDropout(_NeighborhoodAttention):
    """Layers with dropout of attention weights, which only the split form has."""

    attn_drop: float

    def attend(self, qkv: Tensor) -> Tensor:
        if not (self.training and self.attn_drop):
            return super().attend(qkv)
        tensors = qkv.unflatten(-1, (3, self.num_heads, -1)).movedim(-2, 1).unbind(dim=-2)
        query, key, value = tensors  # (B, heads, *S, dim)
        kernel_size, _, dilation, rpb = self.window(query.shape[2:-1])
        of_windows: dict[str, Any] = {
            "kernel_size": kernel_size,
            "dilation": dilation,
            "is_causal": self.is_causal,
        }
        qk, av = _SPLIT[self.rank - 1]
        weights = qk(query * self.scale, key, rpb=rpb, **of_windows).softmax(-1)
        out = av(F.dropout(weights, self.attn_drop), value, **of_windows)
        return out.movedim(1, -2).flatten(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, attn_drop={self.attn_drop}"


_SPLIT = ((na1d_qk, na1d_av), (na2d_qk, na2d_av), (na3d_qk, na3d_av))


class _Of0_14(_WithDropout):  # noqa: N801 (a version)
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            kernel_size,
            dilation=dilation or 1,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            proj_drop=proj_drop,
            rel_pos_bias=bias,
            small_maps="pad",
        )
        self.attn_drop = attn_drop


class _Of0_17(_WithDropout):  # noqa: N801 (a version)
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            kernel_size,
            dilation=dilation,
            is_causal=is_causal,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale or None,
            proj_drop=proj_drop,
            rel_pos_bias=rel_pos_bias,
        )
        self.attn_drop = attn_drop


def layers_of(version: str) -> dict[str, type[_NeighborhoodAttention]]:
    """The layers of "0.14" or "0.17" by name.

    Those of 0.14 have a relative position bias by default and pad small maps; those of 0.17 have
    none by default, refuse small maps, and take a size for each axis and causal axes.
    """
    signature = {"0.14": _Of0_14, "0.17": _Of0_17}[version]
    ranks = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)
    return {of.__name__: type(of.__name__, (signature, of), {}) for of in ranks}
