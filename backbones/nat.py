"""NAT and DiNAT: pyramid transformers with neighborhood attention.

Ali Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143. DiNAT
dilates every other block: Ali Hassani and Humphrey Shi, "Dilated Neighborhood Attention
Transformer", https://arxiv.org/abs/2209.15001.

Accepts any input size from 32×32 (smaller ones work down to 1×1); the stage at stride s has ⌈H/s⌉
rows. A map smaller than ``kernel_size`` · dilation is zero-padded inside attention and cropped, as
NATTEN did when the weights were trained. Dilations are not part of checkpoints, which load with
any. The papers' detectors and segmenters use ``out_norms=True, num_classes=0``, and other
``dilations`` in DiNAT.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.core.keywords import checked, widths
from backbones.core.neighborhood import (
    DILATIONS,
    PRESETS,
    NeighborhoodPyramid,
    block_dilations,
    cfg,
    token_stages,
)
from backbones.core.published import SWIN_NAMES, children
from backbones.core.registry import register_variants, variant
from backbones.core.stage import layer_norm

__all__ = ["NAT"]


def _downsample(dim: int, out_dim: int) -> nn.Sequential:
    """(B, dim, H, W) → (B, out_dim, ⌈H/2⌉, ⌈W/2⌉)."""
    conv = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=layer_norm(out_dim)))


class NAT(NeighborhoodPyramid):
    """Neighborhood Attention Transformer, dilated or not.

    Args:
        kernel_size: side of the attention window, odd.
        dilations: of the windows: one for all blocks; one per stage or per block of each stage; or
            the name of a published set: ``"imagenet"``, ``"imagenet-384"``, ``"ade20k"`` (at 512),
            ``"ade20k-640"``, ``"coco"``, ``"mask2former"``, ``"oneformer"``, ``"oneformer-1280"``
            and ``"oneformer-cityscapes"``. The last four are for the large model;
            ``"mask2former"``, ``"oneformer"`` and ``"oneformer-1280"`` require ``kernel_size=11``.
            In stages of other depths, the pattern is continued or truncated.
    """

    first_conv = "stem.conv1"
    # Of Hugging Face's releases, then of the original and its dense copies.
    renames = (
        (r"^(?:nat|dinat)\.", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^encoder\.levels\.", "levels."),
        (r"^levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.self\.", ".attn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        *((rf"^hidden_states_norms\.stage{i + 1}\.", f"norm{i}.") for i in range(4)),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
        *children(r"^patch_embed\.proj", "stem.conv1", "stem.conv2"),
        (r"\.downsample\.reduction\.", ".downsample.conv."),
        (r"\.gamma([12])$", r".ls\1.gamma"),
        *SWIN_NAMES,
    )

    @checked("dims", "num_heads", dims=widths(2), dilations=DILATIONS)
    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3,
        kernel_size: int = 7,
        dilations: int | str | Sequence[int | Sequence[int]] = 1,
        layer_scale: float | None = None,
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
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_chans, dims[0] // 2, 3, 2, 1),
                conv2=nn.Conv2d(dims[0] // 2, dims[0], 3, 2, 1),
                norm=layer_norm(dims[0]),
            )
        )
        self.stages = token_stages(
            dims,
            num_heads,
            block_dilations(dilations, depths, PRESETS),
            kernel_size,
            mlp_ratio,
            proj_drop_rate,
            drop_path_rate,
            _downsample,
            layer_scale,
        )
        self.finish(dims, global_pool, drop_rate, out_norms)

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Like the base's; Hugging Face's releases split projections, and join layer scales."""
        tensors = super().convert_state_dict(state_dict)
        for key in [k for k in tensors if ".attn.query." in k]:
            thirds = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if all(third in tensors for third in thirds):
                joined = torch.cat([tensors.pop(third) for third in thirds])
                tensors[key.replace(".query.", ".qkv.")] = joined
        for key in [k for k in tensors if k.endswith(".layer_scale_parameters")]:
            block = key.removesuffix("layer_scale_parameters")
            gamma1, gamma2 = tensors.pop(key)
            tensors |= {f"{block}ls1.gamma": gamma1, f"{block}ls2.gamma": gamma2}
        return tensors


_1K, _22K = "dinat/checkpoints/imagenet1k/", "dinat/checkpoints/imagenet22k/"
_LARGE_IMAGES: dict[str, Any] = dict(input_size=(3, 384, 384), crop_pct=1.0)
_SIZES = ("mini", "tiny", "small", "base")

default_cfgs = {
    **{
        f"nat_{size}.in1k": cfg(
            f"nat/checkpoints/CLS/nat_{size}",
            paper_name="Neighborhood Attention Transformer",
            paper_ids="arXiv:2204.07143",
        )
        for size in _SIZES
    },
    **{f"dinat_{size}.in1k": cfg(f"{_1K}dinat_{size}_in1k_224") for size in _SIZES},
    "dinat_large.in22k_ft_in1k": cfg(_1K + "dinat_large_in22k_in1k_224"),
    "dinat_large_384.in22k_ft_in1k": cfg(_1K + "dinat_large_in22k_in1k_384", **_LARGE_IMAGES),
    "dinat_large_384_11x11.in22k_ft_in1k": cfg(
        _1K + "dinat_large_in22k_in1k_384_11x11", **_LARGE_IMAGES
    ),
    "dinat_large_21k.in22k": cfg(_22K + "dinat_large_in22k_224", num_classes=21841),
    "dinat_large_21k_11x11.in22k": cfg(
        _22K + "dinat_large_in22k_224_11x11interp", num_classes=21841
    ),
}

_MINI: dict[str, Any] = dict(drop_path_rate=0.2)
_TINY: dict[str, Any] = dict(_MINI, depths=(3, 4, 18, 5))
_SMALL: dict[str, Any] = dict(
    dims=(96, 192, 384, 768),
    depths=(3, 4, 18, 5),
    num_heads=(3, 6, 12, 24),
    mlp_ratio=2,
    drop_path_rate=0.3,
)
_BASE: dict[str, Any] = dict(
    dims=(128, 256, 512, 1024),
    depths=(3, 4, 18, 5),
    num_heads=(4, 8, 16, 32),
    mlp_ratio=2,
    layer_scale=1e-5,
    drop_path_rate=0.5,
)
_LARGE: dict[str, Any] = dict(
    dims=(192, 384, 768, 1536), depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2
)

nat_mini = variant(NAT, **_MINI)
nat_tiny = variant(NAT, **_TINY)
nat_small = variant(NAT, **_SMALL, layer_scale=1e-5)
nat_base = variant(NAT, **_BASE)
dinat_mini = variant(NAT, **_MINI, dilations="imagenet")
dinat_tiny = variant(NAT, **_TINY, dilations="imagenet")
# Unlike NAT-Small, without layer scale.
dinat_small = variant(NAT, **_SMALL, dilations="imagenet")
dinat_base = variant(NAT, **_BASE, dilations="imagenet")
dinat_large = variant(NAT, **_LARGE, dilations="imagenet", drop_path_rate=0.35)
dinat_large_384 = variant(NAT, **_LARGE, dilations="imagenet-384", drop_path_rate=0.35)
dinat_large_384_11x11 = variant(
    NAT, **_LARGE, kernel_size=11, dilations="imagenet", drop_path_rate=0.35
)
dinat_large_21k = variant(NAT, **_LARGE, dilations="imagenet", drop_path_rate=0.2)
dinat_large_21k_11x11 = variant(
    NAT, **_LARGE, kernel_size=11, dilations="imagenet", drop_path_rate=0.2
)

register_variants(__name__)
