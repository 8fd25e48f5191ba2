"""OverLoCK: an overview of the whole image guides dynamic convolutions that look closely.

Meng Lou and Yizhou Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with
Context-Mixing Dynamic Kernels", https://arxiv.org/abs/2502.20087.

Accepts any input size from 32×32; the stage at stride s has ⌈H/s⌉ rows. Up to 192 pixels a side,
maps are smaller than the dynamic kernels and enlarged for them, as in the original. In train mode,
a classifier returns a tuple: its logits and those of an auxiliary head on the overview, whose loss
the paper weights by 0.4.

Checkpoints of the original's training form and of its merged form load into a new model; ``fuse()``
merges, and folds more than the original does. The paper's segmenters use ``num_classes=0,
out_norms=True``, its detectors also ``overview_feature=True``. There, the second map goes on
normalised, so that stages 3 and 4 see another input than in the classifier.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from backbones.common.checks import several, whole
from backbones.core.base import StagedBackbone
from backbones.core.keywords import BLOCKS, CHANNELS, KERNEL, checked
from backbones.core.published import Rename, children, imagenet_cfg, renamed, stem_layer
from backbones.core.registry import register_variants, variant
from backbones.core.stage import Stage
from backbones.overlock.blocks import Block, ChannelAffine, DynamicBlock, window_offsets
from ops.arguments import require_tensor
from ops.batch_norm import BatchNorm2d
from ops.conv import ConvHead, ConvNorm
from ops.init import init_trunc_normal
from ops.large_kernel import DilatedReparamConv2d

__all__ = ["OverLoCK"]

_HIDDEN = 1024  # channels before the classifier


class Overview(nn.Module):
    """The Overview-Net, at half the resolution of its input.

    (B, in_chs, H, W) → its last map (B, dim, ⌈H/2⌉, ⌈W/2⌉), and the context (B, context_dim, …).
    """

    def __init__(
        self, blocks: Sequence[nn.Module], in_chs: int, dim: int, context_dim: int
    ) -> None:
        super().__init__()
        self.downsample = ConvNorm(in_chs, dim, 3, 2)
        self.blocks = nn.Sequential(*blocks)
        self.proj = nn.Conv2d(dim, context_dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(self.downsample(x))
        return x, self.proj(x)


class OverviewStage(Stage):
    """The last stage of the Base-Net, the overview, and the first stage of the Focus-Net.

    (B, in_chs, H, W) → map and its context (B, dim + context_dim, ⌈H/2⌉, ⌈W/2⌉), the overview's
    context and map.
    """

    def __init__(
        self,
        base: Sequence[nn.Module],
        overview: Overview,
        focus: Sequence[nn.Module],
        downsample: nn.Module,
        kernel_size: int,
    ) -> None:
        super().__init__([*base, overview, *focus], downsample)
        self.kernel_size = kernel_size
        self.base_depth = len(base)

    def forward(self, x: Tensor) -> Any:
        x = self.run_blocks(self.downsample(x), stop=self.base_depth)
        overview: Any = self.run_blocks(x, first=self.base_depth, stop=self.base_depth + 1)
        features, context = overview
        guide = F.interpolate(context, size=x.shape[2:], mode="bilinear")
        offsets = window_offsets(x.shape[2:], self.kernel_size, x.device)
        x = torch.cat((x, guide), dim=1)
        x = self.run_blocks(x, guide, offsets, first=self.base_depth + 1)
        return x, context, features


class Halving(nn.Module):
    """Convolutions of stride 2 on a map and its context, which are concatenated.

    (B, in_chs + context_dim, H, W) → (B, out_chs + context_dim, ⌈H/2⌉, ⌈W/2⌉).
    """

    def __init__(self, in_chs: int, out_chs: int, context_dim: int) -> None:
        super().__init__()
        self.x_proj = ConvNorm(in_chs, out_chs, 3, 2)
        self.h_proj = ConvNorm(context_dim, context_dim, 3, 2)
        self.dims = (in_chs, context_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, context = x.split(self.dims, dim=1)
        return torch.cat((self.x_proj(x), self.h_proj(context)), dim=1)


class FocusStage(Stage):
    """The last stage of the Focus-Net, from the output of :class:`OverviewStage` to one alike."""

    def __init__(self, focus: Sequence[nn.Module], downsample: nn.Module, kernel_size: int) -> None:
        super().__init__(focus, downsample)
        self.kernel_size = kernel_size

    def forward(self, x: Any) -> Any:
        x, context, overview = x
        x = self.downsample(x)
        offsets = window_offsets(x.shape[2:], self.kernel_size, x.device)
        return self.run_blocks(x, context, offsets), context, overview


class AuxHead(nn.Module):
    """Norm, mean, linear: (B, dim, H, W) → (B, num_classes). Only used in training."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = BatchNorm2d(dim)
        self.fc = nn.Linear(dim, num_classes)
        init_trunc_normal(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).mean(dim=(2, 3)))

    def fuse(self) -> nn.Module:
        """Nothing, since a fused model is not trained."""
        return nn.Identity()


class OverviewFeature(nn.Module):
    """Norm, projection and small scale, in detectors: (B, dim, H, W) → (B, out_dim, H, W)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.proj = nn.Conv2d(dim, out_dim, 1)
        self.scale = ChannelAffine(out_dim, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.proj(self.norm(x)))


class OverLoCK(StagedBackbone):
    """OverLoCK.

    Args:
        dims, depths, kernel_sizes: of the Base-Net's three stages and of the Overview-Net. The
            Focus-Net's two stages have the widths and kernels of the last two; the context has a
            quarter of the last width. Kernels are among 7, 13, 15 and 17.
        focus_depths, num_heads: of the Focus-Net's two stages.
        drop_path_rate: stochastic depth of the last block, increasing linearly from 0 in the order
            Base-Net, Overview-Net, Focus-Net.
        layer_scale: initial scale of the shortcuts at strides 16 and 32.
        aux_head: classify the overview, too, in train mode.
        out_norms: normalise the returned maps: all, none, or the listed stages. The map of stage 1
            also goes on normalised, as in the paper's dense networks.
        overview_feature: add the overview to the last map returned, as the paper's detectors do.
    """

    first_conv = "stem.0.conv"
    optional_parts = ("aux_head.", "overview_feature.", "stages.1.norm.")

    @checked(
        dims=several(whole(4, 1 << 16), count=4),
        depths=several(BLOCKS, count=4),
        focus_depths=several(BLOCKS, count=2),
        num_heads=several(CHANNELS, count=2),
        kernel_sizes=several(KERNEL, count=4),
    )
    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (4, 4, 6, 2),
        focus_depths: Sequence[int] = (12, 2),
        num_heads: Sequence[int] = (8, 16),
        kernel_sizes: Sequence[int] = (17, 15, 13, 7),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1.0,
        aux_head: bool = True,
        out_norms: bool | Sequence[int] = False,
        overview_feature: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        blocks = sum(depths) + sum(focus_depths)
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, blocks))
        half, context_dim = dims[0] // 2, dims[3] // 4
        static = [
            [
                Block(dims[i], kernel_sizes[i], next(rates), layer_scale if i >= 2 else None)
                for _ in range(depths[i])
            ]
            for i in range(4)
        ]
        dynamic = [
            [
                DynamicBlock(
                    dims[i],
                    context_dim,
                    num_heads[i - 2],
                    kernel_sizes[i],
                    next(rates),
                    layer_scale,
                    # To the very first block, the map's own context is the overview's.
                    mixes_context=i > 2 or j > 0,
                )
                for j in range(focus_depths[i - 2])
            ]
            for i in (2, 3)
        ]
        widths = ((in_chans, half), (half, half), (half, dims[0]), (dims[0], dims[0]))
        self.stem = nn.Sequential(
            *(
                ConvNorm(*width, 3, 2 - i % 2, act_layer=nn.GELU if i < 3 else None)
                for i, width in enumerate(widths)
            )
        )
        self.stages = nn.Sequential(
            Stage(static[0]),
            Stage(static[1], ConvNorm(dims[0], dims[1], 3, 2)),
            OverviewStage(
                static[2],
                Overview(static[3], dims[2], dims[3], context_dim),
                dynamic[0],
                ConvNorm(dims[1], dims[2], 3, 2),
                kernel_sizes[2],
            ),
            FocusStage(dynamic[1], Halving(dims[2], dims[3], context_dim), kernel_sizes[3]),
        )
        self.norm = nn.Identity()
        out_dim = dims[3] + context_dim
        self.head = ConvHead(out_dim, _HIDDEN, num_classes, global_pool, drop_rate, bias=False)
        self.aux_head: nn.Module = nn.Identity()
        if aux_head and num_classes:
            self.aux_head = AuxHead(dims[3], num_classes)
        self.describe_features(
            (dims[0], dims[1], dims[2] + context_dim, out_dim),
            head_hidden_size=_HIDDEN,
            out_norms=out_norms,
        )
        if "1" in self.out_norms:
            self.stages[1].norm = self.out_norms.pop("1")
        self.overview_feature: nn.Module | None = None
        if overview_feature:
            self.overview_feature = OverviewFeature(dims[3], out_dim)
        if num_classes == 0 and out_norms:
            self.head.reset(0, "")
        self.apply(init_trunc_normal)

    def forward(self, x: Tensor) -> Any:
        """Logits (B, num_classes); in train mode also the auxiliary head's."""
        if not self.training or isinstance(self.aux_head, nn.Identity):
            return super().forward(x)
        require_tensor("x", x)
        x, _, overview = self.stages(self.stem(x))
        return self.forward_head(x), self.aux_head(overview)

    def stage_feature(self, stage: int, output: Any, norm: bool = False) -> Tensor:
        """The map that is returned for a stage; detectors add the overview to the last."""
        x = super().stage_feature(stage, output, norm)
        if stage == 3 and self.overview_feature is not None:
            x = x + self.overview_feature(output[2])
        return x

    def prune_stages(self, taken: Sequence[int]) -> bool:
        """Like the base's; also drops the addition to a map that is not selected."""
        if taken[-1] < 3 and self.overview_feature is not None:
            self.overview_feature = nn.Identity()
        return super().prune_stages(taken)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Like the base's, for both classifiers."""
        super().reset_classifier(num_classes, global_pool)
        if isinstance(self.aux_head, AuxHead):
            width, weight = self.aux_head.fc.in_features, next(self.parameters())
            head = AuxHead(width, num_classes) if num_classes else nn.Identity()
            self.aux_head = head.to(weight.device, weight.dtype).train(self.training)

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts the names of the original's classifiers and dense networks, merged or not."""
        # After pruning, the names of later stages do not matter.
        depth = next((s.base_depth for s in self.stages if isinstance(s, OverviewStage)), 0)
        converted = super().convert_state_dict(
            {_convert_key(key, depth): tensor for key, tensor in state_dict.items()}
        )
        for name, layer in self.named_modules():
            if isinstance(layer, DilatedReparamConv2d):
                bias = converted.pop(f"{name}.large.conv.bias", None)
                if bias is not None:
                    state = layer.unmerged(converted[f"{name}.large.conv.weight"], bias)
                    converted |= {f"{name}.{part}": tensor for part, tensor in state.items()}
        return converted


def _convert_key(key: str, base_depth: int) -> str:
    """Our name of a tensor; our own names are unchanged."""
    overview, focus = f"stages.2.blocks.{base_depth}.", base_depth + 1
    if match := re.match(r"(sub_)?blocks(\d)\.(\d+)\.", key):
        stage, block, name = int(match[2]) - 1, int(match[3]), key[match.end() :]
        name = renamed(name, _DYNAMIC if match[1] else _STATIC)
        if match[1] and stage == 2:
            block += focus
        place = overview if stage == 3 and not match[1] else f"stages.{stage}."
        return f"{place}blocks.{block}.{renamed(name, _LARGE_KERNEL)}"
    key = re.sub(r"^(?:patch_embed4|high_level_proj)\.", lambda m: overview + m[0], key)
    return renamed(key, _RENAMES)


_LARGE_KERNEL = (
    (r"\.lk_origin\.", ".large.conv."),
    (r"\.origin_bn\.", ".large.norm."),
    (r"\.dil_conv_k(\d+)_(\d+)\.", r".branches.k\1_d\2.conv."),
    (r"\.dil_bn_k(\d+)_(\d+)\.", r".branches.k\1_d\2.norm."),
)
_SQUEEZE = children(r"^se\.proj", None, "se.fc1", None, "se.fc2")
_MLP = ("mlp.fc1", None, "mlp.dwconv.conv", "mlp.grn", "mlp.fc2")
_STATIC = (
    (r"^dwconv\.", "dwconv.conv."),
    *children("^proj", "norm", "lk.conv", "lk.norm", "se", *_MLP),
    *_SQUEEZE,
)
_DYNAMIC = (
    (r"^dwconv([12])\.", r"dwconv\1.conv."),
    *children(
        "^fusion", "fusion.dwconv.conv", "fusion.dwconv.norm", None, "fusion.fc", "fusion.grn"
    ),
    *children("^weight_query", "mix.query.conv", "mix.query.norm"),
    *children("^weight_key", None, "mix.key.conv", "mix.key.norm"),
    (r"^weight_proj\.", "mix.tap_"),
    (r"^rpb([12])$", r"mix.rpb\1"),
    *children("^dyconv_proj", "mix.proj.conv", "mix.proj.norm"),
    *children("^lepe", "lepe.conv", "lepe.norm"),
    (r"^se_layer\.", "se."),
    *children("^gate", "gate.conv", "gate.norm"),
    *children("^proj", "norm", "proj"),
    *children("^mlp", *_MLP),
    *_SQUEEZE,
)
_RENAMES: tuple[Rename, ...] = (
    (r"^patch_embed1\.(\d+)\.", stem_layer),
    (r"^patch_embed2\.", "stages.1.downsample."),
    (r"^patch_embed3\.", "stages.2.downsample."),
    (r"\.patch_embed4\.", ".downsample."),
    (r"\.high_level_proj\.", ".proj."),
    (r"^patch_embedx\.", "stages.3.downsample."),
    *children(r"(\.downsample(?:\.[xh]_proj)?)", r"\1.conv", r"\1.norm"),
    (r"^extra_norm\.1\.", "stages.1.norm."),
    (r"^extra_norm\.4\.", "overview_feature.norm."),
    (r"^extra_norm\.", "out_norms."),
    *children("^h_proj", "overview_feature.proj", "overview_feature.scale"),
    *children("^head", "head.proj.conv", "head.proj.norm", None, None, "head.fc"),
    *children("^aux_head", "aux_head.norm", None, "aux_head.fc"),
)


def _cfgs(name: str, crop_pct: float) -> dict[str, dict[str, Any]]:
    """The weights of the training form, and the same merged."""
    cfg = partial(
        imagenet_cfg,
        url="https://github.com/LMMMEng/OverLoCK/releases/download/v1/{}.pth",
        crop_pct=crop_pct,
        license="apache-2.0",
        origin_url="https://github.com/LMMMEng/OverLoCK",
        paper_name=(
            "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic "
            "Kernels"
        ),
        paper_ids="arXiv:2502.20087",
    )
    return {
        f"{name}.in1k": cfg(f"{name}_in1k_224"),
        f"{name}.in1k_merged": cfg(f"{name}_in1k_224_reparam"),
    }


default_cfgs = {
    **_cfgs("overlock_xt", 0.925),
    **_cfgs("overlock_t", 0.95),
    **_cfgs("overlock_s", 0.95),
    **_cfgs("overlock_b", 0.975),
}

overlock_xt = variant(
    OverLoCK,
    dims=(56, 112, 256, 336),
    depths=(2, 2, 3, 2),
    focus_depths=(6, 2),
    num_heads=(8, 12),
    drop_path_rate=0.1,
)
overlock_t = variant(OverLoCK, drop_path_rate=0.15)
overlock_s = variant(
    OverLoCK,
    dims=(64, 128, 320, 512),
    depths=(6, 6, 8, 3),
    focus_depths=(16, 3),
    num_heads=(16, 32),
    drop_path_rate=0.4,
)
overlock_b = variant(
    OverLoCK,
    dims=(80, 160, 384, 576),
    depths=(8, 8, 10, 4),
    focus_depths=(20, 4),
    num_heads=(12, 18),
    drop_path_rate=0.5,
)

register_variants(__name__)
