"""MedViTV2: neighborhood attention and Kolmogorov-Arnold layers for medical images.

Omid Nejati Manzari et al., "Medical Image Classification with KAN-Integrated Transformers and
Dilated Neighborhood Attention", https://arxiv.org/abs/2502.13693.

Accepts any input size from 32×32 (smaller ones work in eval mode), square or not; the stage at
stride s has ⌈H/s⌉ rows. The original only accepts square images of 97 pixels or more. If a map is
smaller than the window of neighborhood attention, the dilation is reduced first and then the
window, until it covers the whole map.

To match the published weights, three things follow the published code instead of the paper: there
is no dilation, unless set by ``dilation``; channels-last layers reinterpret the memory of a
channels-first map, so that what they treat as a pixel's channels is a run of the map; and a
residual branch of the local blocks also adds its normalised input.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, calculate_drop_path_rates
from torch import Tensor, nn

from backbones.common.checks import several
from backbones.core.base import StagedBackbone
from backbones.core.keywords import CHANNELS, SHARE, checked
from backbones.core.published import children, imagenet_cfg, renamed
from backbones.core.registry import register_variants, variant
from backbones.core.stage import Stage
from backbones.medvitv2.blocks import GlobalBlock, LocalBlock
from ops.batch_norm import BatchNorm2d
from ops.conv import ConvNorm
from ops.init import init_trunc_normal

__all__ = ["MedViTV2"]


def _downsample(in_dim: int, dim: int | None, stride: int) -> nn.Module:
    """Average pooling (including odd edges) and a pointwise convolution, each if needed.

    With ``dim`` None, the following block has the convolution.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stride > 1:
        layers["pool"] = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
    if dim is not None and (stride > 1 or dim != in_dim):
        layers["proj"] = ConvNorm(in_dim, dim)
    return nn.Sequential(layers)


class MedViTV2(StagedBackbone):
    """Medical vision transformer, second version.

    Stage 1 has local blocks only, stage 2 ends with a global block, every third block of stage 3 is
    global, and stage 4 has global blocks only.

    Args:
        dims, depths: of the four stages; multiples of ``head_dim``.
        stem_dims: of the first three convolutions; the fourth has the last.
        sr_ratios: of the global blocks' attention in each stage, see
            :class:`ops.attention.pooled.PooledAttention`.
        head_dim: channels of a head.
        mix_ratio: fraction of a global block's channels for attention.
        window_size: of neighborhood attention.
        dilation: of neighborhood attention: one for all stages, or one per stage. The published
            weights use none.
    """

    first_conv = "stem.0.conv"

    @checked("dims", "sr_ratios", stem_dims=several(CHANNELS, count=3), mix_ratio=SHARE)
    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        stem_dims: Sequence[int] = (64, 32, 64),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        *,
        head_dim: int = 32,
        mix_ratio: float = 0.75,
        window_size: int = 7,
        dilation: int | Sequence[int] = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        dilations = (dilation,) * len(dims) if isinstance(dilation, int) else tuple(dilation)
        if len(dilations) != len(dims):
            raise ValueError(f"dims and dilation must have the same length, got {dims}, {dilation}")
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"dims must be multiples of head_dim {head_dim}, got {tuple(dims)}")
        self.depths = tuple(depths)
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        widths = (in_chans, *stem_dims, stem_dims[-1])
        self.stem = nn.Sequential(
            *(
                ConvNorm(widths[i], widths[i + 1], 3, stride, act_layer=nn.ReLU)
                for i, stride in enumerate((2, 1, 1, 2))
            )
        )

        def block(i: int, j: int, in_dim: int) -> nn.Module:
            dim, drop = dims[i], next(rates)
            if not _is_global(i, j, depths[i]):
                kernel_size = 3 if i else 7  # of the feed-forward
                return LocalBlock(dim, head_dim, window_size, dilations[i], kernel_size, drop)
            projects = i > 0 and j == 0
            return GlobalBlock(
                in_dim, dim, head_dim, sr_ratios[i], mix_ratio, drop, project_input=projects
            )

        stages, in_dim = [], stem_dims[-1]
        for i, dim in enumerate(dims):
            starts_global = _is_global(i, 0, depths[i])
            downsample = _downsample(in_dim, None if starts_global else dim, 2 if i else 1)
            blocks = [block(i, j, dim if j else in_dim) for j in range(depths[i])]
            stages.append(Stage(blocks, downsample))
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self.norm = BatchNorm2d(dims[-1])
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate)
        self.describe_features(dims)
        self.apply(init_trunc_normal)

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts the names of the original, which counts blocks through all stages.

        Missing grids are the model's constants.
        """
        converted = super().convert_state_dict(
            {_convert_key(key, self.depths): tensor for key, tensor in state_dict.items()}
        )
        for name, parameter in self.named_parameters():
            if name.endswith(".grid") and name.replace(".grid", ".linear.weight") in converted:
                converted.setdefault(name, parameter.detach())
        return converted


def _is_global(stage: int, block: int, depth: int) -> bool:
    """Whether a block is global, as in the paper."""
    return (False, block == depth - 1, block % 3 == 2, True)[stage]


_LOCAL_RENAMES = ((r"^conv\.conv\.", "ffn."),)
_GLOBAL_RENAMES = (
    (r"^conv\.conv\.", "unused."),
    (r"^patch_embed\.", "embed."),
    (r"^e_mhsa\.", "attn."),
    (r"^projection\.", "proj."),
    (r"^mhca\.group_conv3x3\.", "conv.conv.conv."),
    (r"^mhca\.norm\.", "conv.conv.norm."),
    (r"^mhca\.projection\.", "conv.proj."),
    (r"^kan\.layers\.(\d+)\.layernorm\.", r"kan.\1.norm."),
    (r"^kan\.layers\.(\d+)\.rbf\.", r"kan.\1."),
    (r"^kan\.layers\.(\d+)\.spline_linear\.", r"kan.\1.linear."),
)
_FFN_RENAMES = (
    *children(
        "^(ffn|unused)",
        *(r"\1.expand.conv", r"\1.expand.norm", None, r"\1.dwconv.conv", r"\1.dwconv.norm"),
        *(None, r"\1.se", r"\1.project.conv", r"\1.project.norm"),
    ),
    *children(r"\.se\.fc", ".se.fc1", None, ".se.fc2"),
)


def _convert_key(key: str, depths: Sequence[int]) -> str:
    if key.startswith("proj_head.0."):
        return "head.fc." + key.removeprefix("proj_head.0.")
    match = re.match(r"features\.(\d+)\.", key)
    if match is None or int(match[1]) >= sum(depths):
        return key
    stage, block, name = 0, int(match[1]), key[match.end() :]
    while block >= depths[stage]:
        block -= depths[stage]
        stage += 1
    is_global = _is_global(stage, block, depths[stage])
    if name.startswith("patch_embed.") and not is_global:
        return f"stages.{stage}.downsample.proj." + name.removeprefix("patch_embed.")
    name = renamed(name, (_GLOBAL_RENAMES if is_global else _LOCAL_RENAMES) + _FFN_RENAMES)
    return f"stages.{stage}.blocks.{block}.{name}"


_cfg = partial(
    imagenet_cfg,
    url="https://dl.dropbox.com/scl/fi/{}&dl=1",
    crop_pct=1.0,
    crop_mode="squash",
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    license="mit",
    origin_url="https://github.com/Omid-Nejati/MedViTV2",
    paper_name="Medical Image Classification with KAN-Integrated Transformers and Dilated "
    "Neighborhood Attention",
    paper_ids="arXiv:2502.13693",
    notes=("weights for each MedMNIST data set: https://github.com/Omid-Nejati/MedViTV2#readme",),
)

# The authors' starting point; what these weights were trained on is not stated.
default_cfgs = {
    "medvitv2_tiny.pretrain": _cfg(
        "496jbihqp360jacpji554/MedViT_tiny.pth?rlkey=6hb9froxugvtg8l639jmspxfv&st=p9ef06j8"
    ),
    "medvitv2_small.pretrain": _cfg(
        "6nnec8hxcn5da6vov7h2a/MedViT_small.pth?rlkey=yf5twra1cv6ep2oqr79tbzyg5&st=rwx5hy8z"
    ),
    "medvitv2_base.pretrain": _cfg(
        "q5c0u515dd4oc8j55bhi9/MedViT_base.pth?rlkey=5duw3uomnsyjr80wykvedjhas&st=incconx4"
    ),
    "medvitv2_large.pretrain": _cfg(
        "owujijpsl6vwd481hiydd/MedViT_large.pth?rlkey=cx9lqb4a1288nv4xlmux13zoe&st=kcehwbrb"
    ),
}

medvitv2_tiny = variant(MedViTV2, dims=(64, 128, 192, 384), depths=(2, 2, 6, 1), drop_path_rate=0.1)
medvitv2_small = variant(MedViTV2, drop_path_rate=0.1)
medvitv2_base = variant(MedViTV2, dims=(96, 192, 384, 768), drop_path_rate=0.2)
medvitv2_large = variant(MedViTV2, dims=(96, 256, 512, 1024), drop_path_rate=0.2)

register_variants(__name__)
