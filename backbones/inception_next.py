"""InceptionNeXt: ConvNeXt with its large depthwise kernel split into Inception-style branches.

Weihao Yu et al., "InceptionNeXt: When Inception Meets ConvNeXt", https://arxiv.org/abs/2303.16900.

Accepts any input size from 32×32; the stem and the downsampling use no padding, so the stage at
stride s has ⌊H/s⌋ rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ConvMlp, DropPath, SelectAdaptivePool2d
from torch import Tensor, nn

from backbones.core.base import StagedBackbone
from backbones.core.keywords import SHARE, checked
from backbones.core.published import children, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import make_stages
from ops.batch_norm import BatchNorm2d
from ops.conv import ConvNorm, InceptionDWConv2d, NormConv
from ops.init import init_trunc_normal
from ops.reparam import fold_norm_before, fold_scale_after

__all__ = ["InceptionNeXt"]


class Block(nn.Module):
    """Inception depthwise convolution, norm, MLP, scale: (B, dim, H, W) → (B, dim, H, W)."""

    norm: nn.Module
    gamma: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        band_kernel_size: int,
        branch_ratio: float,
        drop_path: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.token_mixer = InceptionDWConv2d(
            dim, band_kernel_size=band_kernel_size, branch_ratio=branch_ratio
        )
        self.norm = BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer=nn.GELU)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mlp(self.norm(self.token_mixer(x)))
        if self.gamma is not None:
            mixed = mixed * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(mixed)

    def fuse(self) -> nn.Module:
        """Fold the norm into the MLP's first convolution and the scale into its second."""
        if isinstance(self.norm, nn.BatchNorm2d) and self.gamma is not None:
            self.mlp.fc1 = fold_norm_before(self.norm, self.mlp.fc1)
            self.mlp.fc2 = fold_scale_after(self.mlp.fc2, self.gamma)
            self.norm = nn.Identity()
            self.register_parameter("gamma", None)
        return self


class MlpHead(nn.Module):
    """Pool, linear, GELU, norm, linear: (B, dim, H, W) → (B, num_classes).

    With 0 classes, it returns the normalised hidden features.
    """

    def __init__(
        self, dim: int, num_classes: int, pool_type: str, mlp_ratio: float, drop_rate: float
    ) -> None:
        super().__init__()
        self.num_features = int(mlp_ratio * dim)
        self.fc1: nn.Module
        self.act: nn.Module
        self.norm: nn.Module
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type or "avg", flatten=True)
        self.fc1 = nn.Linear(dim * self.global_pool.feat_mult(), self.num_features)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier; ``pool_type=""`` removes the whole head to return the map."""
        if pool_type == "":
            self.global_pool, self.fc1 = nn.Identity(), nn.Identity()
            self.act, self.norm = nn.Identity(), nn.Identity()
        elif pool_type is not None:
            pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=True)
            if pool.feat_mult() != self.global_pool.feat_mult():
                raise ValueError(
                    f"pooling {pool_type!r} changes the input width of the head's hidden layer; "
                    "pass it as global_pool when creating the model"
                )
            self.global_pool = pool
        self.fc2 = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.norm(self.act(self.fc1(self.global_pool(x)))))
        return x if pre_logits else self.fc2(x)


class InceptionNeXt(StagedBackbone):
    """InceptionNeXt.

    Args:
        band_kernel_size: length of the 1×k and k×1 kernels.
        branch_ratio: fraction of the channels of each convolution branch.
    """

    classifier = "head.fc2"
    renames = (  # of the original, which timm shares
        *children("^stem", "stem.conv", "stem.norm"),
        *children(r"\.downsample", ".downsample.norm", ".downsample.conv"),
    )

    @checked("dims", "mlp_ratios", branch_ratio=SHARE)
    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        mlp_ratios: Sequence[float] = (4, 4, 4, 3),
        *,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        self.stem = ConvNorm(in_chans, dims[0], 4, 4, padding=0, bias=True)
        self.stages = make_stages(
            depths,
            drop_path_rate,
            lambda i, j, rate: Block(
                dims[i], mlp_ratios[i], band_kernel_size, branch_ratio, rate, layer_scale
            ),
            lambda i: NormConv(dims[i - 1], dims[i]),
        )
        self.norm = nn.Identity()
        self.head = MlpHead(dims[-1], num_classes, global_pool, mlp_ratio=3, drop_rate=drop_rate)
        self.describe_features(dims, head_hidden_size=self.head.num_features)
        self.apply(init_trunc_normal)


_cfg = partial(
    imagenet_cfg,
    url="https://github.com/sail-sg/inceptionnext/releases/download/model/inceptionnext_{}.pth",
    license="apache-2.0",
    origin_url="https://github.com/sail-sg/inceptionnext",
    paper_name="InceptionNeXt: When Inception Meets ConvNeXt",
    paper_ids="arXiv:2303.16900",
)

default_cfgs = {
    "inception_next_atto.sail_in1k": _cfg("atto"),
    "inception_next_tiny.sail_in1k": _cfg("tiny"),
    "inception_next_small.sail_in1k": _cfg("small"),
    "inception_next_base.sail_in1k": _cfg("base"),
    "inception_next_base_384.sail_in1k": _cfg("base_384", input_size=(3, 384, 384), crop_pct=1.0),
}

_BASE: dict[str, Any] = dict(dims=(128, 256, 512, 1024), depths=(3, 3, 27, 3))

inception_next_atto = variant(
    InceptionNeXt,
    dims=(40, 80, 160, 320),
    depths=(2, 2, 6, 2),
    band_kernel_size=9,
    branch_ratio=0.25,
    drop_path_rate=0.1,
)
inception_next_tiny = variant(InceptionNeXt, drop_path_rate=0.1)
inception_next_small = variant(InceptionNeXt, depths=(3, 3, 27, 3), drop_path_rate=0.3)
inception_next_base = variant(InceptionNeXt, **_BASE, drop_path_rate=0.4)
inception_next_base_384 = variant(InceptionNeXt, **_BASE, drop_path_rate=0.7, drop_rate=0.5)

register_variants(__name__)
