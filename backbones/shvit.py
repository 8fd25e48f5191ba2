"""SHViT: memory-efficient macro design with single-head attention on part of the channels.

Seokju Yun, Youngmin Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro
Design", https://arxiv.org/abs/2401.16456.

Accepts any input size (from 1×1); the stage at stride s has ⌈H/s⌉ rows. Stages start at stride 16;
with ``stem_features=True`` the stem's maps at strides 2, 4 and 8 come first among the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from backbones.common.checks import several, whole
from backbones.core.base import StagedBackbone
from backbones.core.keywords import checked, widths
from backbones.core.published import FAST_BLOCKS, FAST_NAMES, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import make_stages
from ops.attention.single_head import SingleHeadAttention
from ops.conv import ConvResidual
from ops.mobile import ConvFFN, NormLinearHead, Residual, conv_stem, residual_merging

__all__ = ["SHViT"]


class Block(nn.Module):
    """Residual depthwise convolution, single-head attention and feed-forward, on (B, dim, H, W).

    ``attn_dim`` are the channels for attention; 0 for no attention, as in the first stage.
    """

    def __init__(self, dim: int, attn_dim: int, qk_dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv = ConvResidual(dim, drop_path=drop_path)
        self.mixer = (
            Residual(SingleHeadAttention(dim, attn_dim, qk_dim), drop_path)
            if attn_dim
            else nn.Identity()
        )
        self.ffn = Residual(ConvFFN(dim, 2 * dim), drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(self.conv(x)))


class SHViT(StagedBackbone):
    """Single-head vision transformer.

    Args:
        attn_dims: channels for attention in each stage; 0 for no attention.
        qk_dim: width of query and key.
        distilled: add a second classifier for a teacher's labels, see
            :class:`ops.mobile.NormLinearHead`.
    """

    classifier: str | tuple[str, ...] = "head.fc"
    first_conv = "stem.0.conv"
    # Of the original, fused or not, and of timm.
    renames = (
        *FAST_BLOCKS,
        (r"\.token_mixer\.", ".mixer."),
        (r"\.m\.", ".fn."),
        (r"\.(?:c|conv)\.(?=weight|bias)", ".conv."),
        (r"\.bn\.", ".norm."),
        (r"\.pre_norm\.", ".norm."),
        (r"\.pw([12])\.", r".fc\1."),
        (r"\.proj\.1\.", ".proj."),
        *FAST_NAMES,
    )

    @checked("dims", "attn_dims", dims=widths(8), attn_dims=several(whole(0, 1 << 16)))
    def __init__(
        self,
        dims: Sequence[int] = (128, 224, 320),
        depths: Sequence[int] = (2, 4, 5),
        attn_dims: Sequence[int] = (0, 48, 68),
        qk_dim: int = 16,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distilled: bool = False,
        stem_features: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        if 1 in attn_dims:
            raise ValueError(f"attn_dims must be 0, or 2 or more (for a norm), got {attn_dims}")
        self.stem = conv_stem(in_chans, dims[0])
        self.stages = make_stages(
            depths,
            drop_path_rate,
            lambda i, j, rate: Block(dims[i], attn_dims[i], qk_dim, rate),
            lambda i: residual_merging(dims[i - 1], dims[i]),
        )
        self.norm = nn.Identity()
        self.head = NormLinearHead(
            dims[-1], num_classes, global_pool, drop_rate, distilled=distilled
        )
        if distilled:
            self.classifier = ("head.fc", "head.fc_dist")
        taps = [(i, dims[0] // 2 ** (3 - i), 2 ** (i + 1)) for i in range(3)]
        self.describe_features(
            dims, [16 * 2**i for i in range(len(dims))], stem_features=taps if stem_features else ()
        )


_cfg = partial(
    imagenet_cfg,
    url="https://github.com/ysj9909/SHViT/releases/download/v1.0/{}.pth",
    license="mit",
    origin_url="https://github.com/ysj9909/SHViT",
    paper_name="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
    paper_ids="arXiv:2401.16456",
)

default_cfgs = {
    "shvit_s1.in1k": _cfg("shvit_s1"),
    "shvit_s2.in1k": _cfg("shvit_s2"),
    "shvit_s3.in1k": _cfg("shvit_s3"),
    "shvit_s4.in1k": _cfg("shvit_s4", input_size=(3, 256, 256)),
}

shvit_s1 = variant(SHViT, dims=(128, 224, 320), depths=(2, 4, 5), attn_dims=(0, 48, 68))
shvit_s2 = variant(SHViT, dims=(128, 308, 448), depths=(2, 4, 5), attn_dims=(0, 66, 96))
shvit_s3 = variant(SHViT, dims=(192, 352, 448), depths=(3, 5, 5), attn_dims=(0, 75, 96))
shvit_s4 = variant(SHViT, dims=(224, 336, 448), depths=(4, 7, 6), attn_dims=(0, 72, 96))

register_variants(__name__)
