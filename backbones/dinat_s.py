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

from timm.models import generate_default_cfgs
from torch import Tensor

from backbones.core.keywords import checked
from backbones.core.neighborhood import (
    DILATIONS,
    PRESETS,
    NeighborhoodPyramid,
    Pattern,
    block_dilations,
    cfg,
    renamed,
    token_stages,
)
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
        dims, depths, num_heads: of the four stages.
        mlp_ratio: width of the MLPs relative to the stage.
        kernel_size: side of the attention window, odd.
        dilations: of the windows: one for all blocks; one per stage or per block of each stage; or
            the name of a published set: ``"imagenet"``, ``"imagenet-384"``, ``"ade20k"`` (at 512),
            ``"ade20k-640"`` (large model) and ``"coco"``. In stages of other depths, the pattern is
            continued or truncated.
        num_classes, in_chans, global_pool: classes, image channels and pooling, as in timm.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside the MLPs.
        drop_path_rate: stochastic depth of the last block, increasing linearly from 0.
        out_norms: normalise the returned maps, as detectors do: all, none, or the listed stages.
            With ``num_classes=0``, there is then no final norm, as in the paper's dense networks.

    Raises:
        ValueError: sequences of the wrong length, heads that don't divide the width, or an unknown
            name of dilations.
    """

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

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts the names of the original and of its dense copies."""
        return {renamed(key, _RENAMES): tensor for key, tensor in state_dict.items()}


_RENAMES = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^norm(\d)\.", r"out_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    url = "dinat/checkpoints/" + file
    return cfg(DiNATS, url, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224.pth"),
        "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224.pth"),
        "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224.pth"),
        "dinat_s_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224.pth"),
        "dinat_s_large_384.in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_384.pth", input_size=(3, 384, 384), crop_pct=1.0
        ),
        "dinat_s_large_21k.in22k": _cfg(
            "imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841
        ),
    }
)

_LARGE: dict[str, Any] = dict(
    dims=(192, 384, 768, 1536),
    depths=(2, 2, 18, 2),
    num_heads=(6, 12, 24, 48),
)

# DiNAT_s-Tiny, 28.3 M parameters
dinat_s_tiny = variant(DiNATS, drop_path_rate=0.2)
# DiNAT_s-Small, 49.6 M parameters
dinat_s_small = variant(DiNATS, depths=(2, 2, 18, 2), drop_path_rate=0.3)
# DiNAT_s-Base, 87.8 M parameters
dinat_s_base = variant(
    DiNATS,
    dims=(128, 256, 512, 1024),
    depths=(2, 2, 18, 2),
    num_heads=(4, 8, 16, 32),
    drop_path_rate=0.5,
)
# DiNAT_s-Large, 196.5 M parameters
dinat_s_large = variant(DiNATS, **_LARGE, drop_path_rate=0.35)
# DiNAT_s-Large for images of 384×384, more dilated; 196.5 M parameters
dinat_s_large_384 = variant(DiNATS, **_LARGE, dilations="imagenet-384", drop_path_rate=0.35)
# DiNAT_s-Large with the classes of ImageNet-22k, 228.6 M parameters
dinat_s_large_21k = variant(DiNATS, **_LARGE, drop_path_rate=0.2)

register_variants(__name__)
