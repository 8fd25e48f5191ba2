"""DiNAT_s: dilated neighborhood attention in the layout of Swin Transformer.

Ali Hassani and Humphrey Shi, "Dilated Neighborhood Attention Transformer",
https://arxiv.org/abs/2209.15001.

Accepts any input size from 32×32 (smaller ones work down to 1×1). The stem's patches and the 2×2
squares of merging are zero-padded, so the stage at stride s has ⌈H/s⌉ rows. Maps smaller than
``kernel_size`` · dilation are padded inside attention, see :mod:`backbones.nat`. The paper's
detectors and segmenters use ``out_norms=True, num_classes=0`` and other dilations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backbones.core.keywords import checked
from backbones.core.neighborhood import (
    DILATIONS,
    PRESETS,
    NeighborhoodPyramid,
    Pattern,
    block_dilations,
    cfg,
    token_stages,
)
from backbones.core.published import SWIN_NAMES
from backbones.core.registry import register_variants, variant
from ops.patch import PatchEmbed, PatchMerging

__all__ = ["DiNATS"]


# A second stage with two blocks uses the dilations of the last two of the deeper network's four.
DINAT_S_PRESETS: Mapping[str, Pattern] = {
    name: (PRESETS[name][0], PRESETS[name][1][-2:], *PRESETS[name][2:])
    for name in ("imagenet", "imagenet-384", "ade20k", "ade20k-640", "coco")
}


class DiNATS(NeighborhoodPyramid):
    """DiNAT_s.

    Args:
        kernel_size: side of the attention window, odd.
        dilations: of the windows: one for all blocks; one per stage or per block of each stage; or
            the name of a published set: ``"imagenet"``, ``"imagenet-384"``, ``"ade20k"`` (at 512),
            ``"ade20k-640"`` (large model) and ``"coco"``. In stages of other depths, the pattern is
            continued or truncated.
    """

    renames = SWIN_NAMES

    @checked("dims", "num_heads", dilations=DILATIONS)
    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4,
        kernel_size: int = 7,
        dilations: int | str | Sequence[int | Sequence[int]] = "imagenet",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norms: bool | Sequence[int] = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        self.stem = PatchEmbed(in_chans, dims[0])
        self.stages = token_stages(
            dims,
            num_heads,
            block_dilations(dilations, depths, DINAT_S_PRESETS),
            kernel_size,
            mlp_ratio,
            proj_drop_rate,
            drop_path_rate,
            PatchMerging,
        )
        self.finish(dims, global_pool, drop_rate, out_norms)


_1K, _22K = "dinat/checkpoints/imagenet1k/", "dinat/checkpoints/imagenet22k/"

default_cfgs = {
    "dinat_s_tiny.in1k": cfg(_1K + "dinat_s_tiny_in1k_224"),
    "dinat_s_small.in1k": cfg(_1K + "dinat_s_small_in1k_224"),
    "dinat_s_base.in1k": cfg(_1K + "dinat_s_base_in1k_224"),
    "dinat_s_large.in22k_ft_in1k": cfg(_1K + "dinat_s_large_in1k_224"),
    "dinat_s_large_384.in22k_ft_in1k": cfg(
        _1K + "dinat_s_large_in1k_384", input_size=(3, 384, 384), crop_pct=1.0
    ),
    "dinat_s_large_21k.in22k": cfg(_22K + "dinat_s_large_in22k_224", num_classes=21841),
}

_LARGE: dict[str, Any] = dict(
    dims=(192, 384, 768, 1536), depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)
)

dinat_s_tiny = variant(DiNATS, drop_path_rate=0.2)
dinat_s_small = variant(DiNATS, depths=(2, 2, 18, 2), drop_path_rate=0.3)
dinat_s_base = variant(
    DiNATS,
    dims=(128, 256, 512, 1024),
    depths=(2, 2, 18, 2),
    num_heads=(4, 8, 16, 32),
    drop_path_rate=0.5,
)
dinat_s_large = variant(DiNATS, **_LARGE, drop_path_rate=0.35)
dinat_s_large_384 = variant(DiNATS, **_LARGE, dilations="imagenet-384", drop_path_rate=0.35)
dinat_s_large_21k = variant(DiNATS, **_LARGE, drop_path_rate=0.2)

register_variants(__name__)
