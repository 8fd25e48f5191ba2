"""BiFormer: a vision transformer with attention routed between regions by content.

Lei Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention",
https://arxiv.org/abs/2303.08810.

Accepts any input size from 32×32. The stage at stride s has ⌈H/s⌉ rows; the STL variants (Swin's
layout) use no padding in their strided convolutions and have ⌊H/s⌋. If ``n_win`` does not divide a
map, it is padded as with the original's ``auto_pad=True``. In the original, ``biformer_stl`` has no
such option, and ``biformer_stl_nchw`` fails on maps smaller than ``n_win``; here, the first pads
like the others, and the second has regions of at least one token.
The paper's detectors and segmenters use ``out_norms=True, num_classes=0`` with ``n_win=16`` (COCO)
or ``n_win=8`` (ADE20K).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, DropPath, Mlp
from torch import Tensor, nn

from backbones.core.base import StagedBackbone
from backbones.core.keywords import checked, widths
from backbones.core.published import children, imagenet_cfg, stem_layer
from backbones.core.registry import register_variants, variant
from backbones.core.stage import make_stages
from ops.attention.bilevel import BiLevelRoutingAttention
from ops.attention.softmax import softmax_attention
from ops.batch_norm import BatchNorm2d
from ops.conv import ConvNorm, NormConv
from ops.init import init_linear
from ops.position import ConvPosition

__all__ = ["BiFormer"]


class GlobalAttention(nn.Module):
    """Global attention plus a 5×5 depthwise convolution, of the input or the values.

    (B, H, W, dim) → (B, H, W, dim).
    """

    def __init__(self, dim: int, num_heads: int = 8, *, lepe_on_value: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.lepe_on_value = lepe_on_value
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        heads = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))  # (B, HW, 3, heads, d)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        out = softmax_attention(query, key, value)  # (B, heads, HW, d)
        out = out.transpose(1, 2).reshape(x.shape)
        source = qkv.chunk(3, dim=-1)[2] if self.lepe_on_value else x
        return self.proj(out + self.lepe(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Residual depthwise position term, attention and MLP: (B, dim, H, W) → (B, dim, H, W)."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        pos_embed: bool,
        drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pos_embed = ConvPosition(dim) if pos_embed else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


# Of the original's five variants and of its dense networks, but for the downsampling.
_RENAMES = (
    (r"^downsample_layers\.0\.(\d)\.", stem_layer),
    (r"^stages\.(\d)\.(\d+)\.pos_embed\.", r"stages.\1.\2.pos_embed.conv."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.(?:qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(?:wo|output_linear)\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^extra_norms\.", "out_norms."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


class BiFormer(StagedBackbone):
    """BiFormer.

    Args:
        topks: regions that each region attends to, by stage; None for global attention.
        n_win: regions per side.
        head_dim: width of the routed attention's heads; global attention has 8 heads.
        swin_layout: non-overlapping stem and downsampling, no position terms (the STL variants).
        nchw: the authors' second implementation. Regions have ⌊H/n_win⌋ rows, so their number
            varies; padding is applied after the projection and ignored by the routing; the
            convolution next to the global attention is applied to the values; the blocks' linear
            layers are initialised like PyTorch's convolutions.
    """

    first_conv = "stem.0.conv"

    @checked("dims", "mlp_ratios", "topks", dims=widths(2))
    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        topks: Sequence[int | None] = (1, 4, 16, None),
        n_win: int = 7,
        head_dim: int = 32,
        *,
        swin_layout: bool = False,
        nchw: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: bool | Sequence[int] = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        routed = [dim for dim, topk in zip(dims, topks, strict=True) if topk is not None]
        if any(dim % head_dim for dim in routed):
            raise ValueError(f"dims must be multiples of head_dim {head_dim}, got {dims}")

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            dim, topk = dims[i], topks[i]
            attn: nn.Module
            if topk is None:
                attn = GlobalAttention(dim, lepe_on_value=nchw)
            else:
                heads = dim // head_dim
                attn = BiLevelRoutingAttention(dim, heads, n_win, topk, pad_input=not nchw)
            return Block(dim, attn, mlp_ratios[i], not swin_layout, proj_drop_rate, drop_path)

        def downsample(i: int) -> nn.Module:
            if swin_layout:
                return NormConv(dims[i - 1], dims[i])
            return ConvNorm(dims[i - 1], dims[i], 3, 2, bias=True)

        names = ("norm", "conv") if swin_layout else ("conv", "norm")
        path, ours = r"^downsample_layers\.(\d)", r"stages.\1.downsample"
        self.renames = (*_RENAMES, *children(path, *(f"{ours}.{name}" for name in names)))
        self.stem = (
            nn.Sequential(ConvNorm(in_chans, dims[0], 4, 4, padding=0, bias=True))
            if swin_layout
            else nn.Sequential(
                ConvNorm(in_chans, dims[0] // 2, 3, 2, bias=True, act_layer=nn.GELU),
                ConvNorm(dims[0] // 2, dims[0], 3, 2, bias=True),
            )
        )
        self.stages = make_stages(depths, drop_path_rate, block, downsample)
        dense = num_classes == 0 and bool(out_norms)
        self.norm = nn.Identity() if dense else BatchNorm2d(dims[-1])
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate)
        self.describe_features(dims, out_norms=out_norms)
        (self.head if nchw else self).apply(init_linear)


_cfg = partial(
    imagenet_cfg,
    url="https://api.onedrive.com/v1.0/shares/{}/root/content",
    license="mit",
    origin_url="https://github.com/rayleizhu/BiFormer",
    paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    paper_ids="arXiv:2303.08810",
)

default_cfgs = {
    "biformer_tiny.in1k": _cfg("s!AkBbczdRlZvChHEOoGkgwgQzEDlM"),
    "biformer_small.in1k": _cfg("s!AkBbczdRlZvChHDyM-x9KWRBZ832"),
    "biformer_base.in1k": _cfg("s!AkBbczdRlZvChHI_XPhoadjaNxtO"),
    "biformer_stl.in1k": _cfg("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1"),
    "biformer_stl_nchw.in1k": _cfg("s!AkBbczdRlZvChWYrKbWbMgqd2Ai0"),
}

# Stochastic depth of BiFormer-T and -B is the training command's default.
biformer_tiny = variant(BiFormer, drop_path_rate=0.1)
biformer_small = variant(BiFormer, depths=(4, 4, 18, 4), drop_path_rate=0.15)
biformer_base = variant(
    BiFormer, dims=(96, 192, 384, 768), depths=(4, 4, 18, 4), drop_path_rate=0.1
)

_STL: dict[str, Any] = dict(
    dims=(96, 192, 384, 768),
    depths=(2, 2, 6, 2),
    mlp_ratios=(4, 4, 4, 4),
    swin_layout=True,
    drop_path_rate=0.1,
)
biformer_stl = variant(BiFormer, **_STL)
biformer_stl_nchw = variant(BiFormer, **_STL, nchw=True)

register_variants(__name__)
