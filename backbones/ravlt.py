"""RAVLT: a vision transformer with linear attention of increased rank.

Qihang Fan, Huaibo Huang, Ran He, "Breaking the Low-Rank Dilemma of Linear Attention",
https://arxiv.org/abs/2411.07635. Written from the paper and a specification of what the published
model computes, since the published code states no licence.

Accepts any input size (from 1×1); the stage at stride s has ⌈H/s⌉ rows. The paper's detectors and
segmenters use ``out_norms=True, num_classes=0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.core.base import StagedBackbone
from backbones.core.keywords import checked, widths
from backbones.core.published import SWIN_NAMES, imagenet_cfg, stem_layer
from backbones.core.registry import register_variants, variant
from backbones.core.stage import Stage, make_stages
from ops.attention.rank_augmented import RankAugmentedAttention, rotary_table
from ops.conv import ConvHead, ConvNorm
from ops.init import init_trunc_normal
from ops.position import ConvPosition
from ops.reparam import fold_scale_after

__all__ = ["RAVLT"]


class ConvMlp(nn.Module):
    """Linear, GELU, 3×3 depthwise with a shortcut, linear: (B, H, W, dim) → (B, H, W, dim)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.dwconv = ConvPosition(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x)).permute(0, 3, 1, 2)
        return self.drop(self.fc2(self.drop(self.dwconv(x).permute(0, 2, 3, 1))))


class Block(nn.Module):
    """Residual position term, attention and MLP, with layer scale, on (B, H, W, dim)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        linear: bool,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.pos = ConvPosition(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RankAugmentedAttention(dim, num_heads, linear=linear)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), drop)
        # 4-D, because optimizers exclude vectors from weight decay and the authors decayed these.
        self.gamma1 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale))
        self.gamma2 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = self.pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        branch = self.attn(self.norm1(x), (sin, cos))
        x = x + self.drop_path(branch if self.gamma1 is None else branch * self.gamma1)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma2 is None else branch * self.gamma2)

    def fuse(self) -> nn.Module:
        """Fold the scales into the preceding projections."""
        if self.gamma1 is not None:
            self.attn.proj = fold_scale_after(self.attn.proj, self.gamma1.flatten())
            self.mlp.fc2 = fold_scale_after(self.mlp.fc2, self.gamma2.flatten())
            self.register_parameter("gamma1", None)
            self.register_parameter("gamma2", None)
        return self


class RAVLTStage(Stage):
    """A stage whose blocks use channels-last maps (B, H, W, dim) and share a rotary table."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None, head_dim: int) -> None:
        super().__init__(blocks, downsample)
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        height, width = x.shape[1:3]
        table = rotary_table(height, width, self.head_dim, device=x.device, dtype=x.dtype)
        return self.run_blocks(x, *table).permute(0, 3, 1, 2)


class RAVLT(StagedBackbone):
    """Rank-augmented vision linear transformer.

    Args:
        layer_scales: initial value of the layer scales, by stage.
        linear: use linear attention, by stage; otherwise softmax attention.
        out_norms: as usual; with ``num_classes=0``, there is then no hidden layer, as in the
            paper's dense networks.
    """

    first_conv = "stem.0.conv"
    # Of the original's classifiers and dense networks.
    renames = (
        (r".*\.RoPE\.angle$", ""),  # a constant
        (r"^patch_embed\.proj\.(\d+)\.", stem_layer),
        (r"\.downsample\.reduction\.", ".downsample.conv."),
        # Not our own names after fuse().
        (r"^(layers\..*\.pos)\.(?=weight|bias)", r"\1.conv."),
        *SWIN_NAMES,
        (r"\.(norm[12])\.norm\.", r".\1."),
        (r"\.gamma_([12])$", r".gamma\1"),
        (r"\.ffn\.dwconv\.", ".mlp.dwconv.conv."),
        (r"\.ffn\.", ".mlp."),
        (r"^extra_norms\.(\d)\.norm\.", r"out_norms.\1."),
        (r"^proj\.", "head.proj.conv."),
        (r"^norm\.", "head.proj.norm."),
    )

    @checked("dims", "num_heads", "layer_scales", "linear", dims=widths(2))
    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        layer_scales: Sequence[float] = (1, 1, 1, 1),
        linear: Sequence[bool] = (True, True, False, False),
        mlp_ratio: float = 3.5,
        *,
        head_hidden_dim: int = 1024,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: bool | Sequence[int] = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        half = dims[0] // 2
        self.stem = nn.Sequential(
            ConvNorm(in_chans, half, 3, 2, bias=True, act_layer=nn.GELU),
            ConvNorm(half, half, 3, bias=True, act_layer=nn.GELU),
            ConvNorm(half, half, 3, bias=True, act_layer=nn.GELU),
            ConvNorm(half, dims[0], 3, 2, bias=True),
        )
        self.stages = make_stages(
            depths,
            drop_path_rate,
            lambda i, j, rate: Block(
                dims[i], num_heads[i], linear[i], mlp_ratio, proj_drop_rate, rate, layer_scales[i]
            ),
            lambda i: ConvNorm(dims[i - 1], dims[i], 3, 2, bias=True),
            RAVLTStage,
            head_dim=lambda i: dims[i] // num_heads[i],
        )
        self.norm = nn.Identity()
        self.head = ConvHead(dims[-1], head_hidden_dim, num_classes, global_pool, drop_rate)
        self.describe_features(dims, head_hidden_size=head_hidden_dim, out_norms=out_norms)
        if self.out_norms and num_classes == 0:
            self.head.reset(0, "")
        self.apply(init_trunc_normal)


_cfg = partial(
    imagenet_cfg,
    url="https://huggingface.co/aldjalkdf/RAVLT/resolve/main/RAVLT_{}.pth",
    license="mit",  # of the weights, according to their model card; the code has none
    origin_url="https://github.com/qhfan/RALA",
    paper_name="Breaking the Low-Rank Dilemma of Linear Attention",
    paper_ids="arXiv:2411.07635",
)

default_cfgs = {f"ravlt_{size.lower()}.in1k": _cfg(size) for size in ("T", "S", "B", "L")}

ravlt_t = variant(RAVLT, drop_path_rate=0.1)
ravlt_s = variant(
    RAVLT,
    dims=(64, 128, 320, 512),
    depths=(3, 5, 9, 3),
    num_heads=(1, 2, 5, 8),
    drop_path_rate=0.15,
)
ravlt_b = variant(
    RAVLT,
    dims=(96, 192, 384, 512),
    depths=(4, 6, 12, 6),
    num_heads=(1, 2, 6, 8),
    layer_scales=(1, 1, 1e-6, 1e-6),
    drop_path_rate=0.4,
)
ravlt_l = variant(
    RAVLT,
    dims=(96, 192, 448, 640),
    depths=(4, 7, 19, 8),
    num_heads=(1, 2, 7, 10),
    layer_scales=(1e-6, 1e-6, 1e-6, 1e-6),
    drop_path_rate=0.55,
)

register_variants(__name__)
