"""Shared by the neighborhood attention families: stages, dilations, names of published weights.

Ali Hassani et al., "Neighborhood Attention Transformer", https://arxiv.org/abs/2204.07143, and
Ali Hassani and Humphrey Shi, "Dilated Neighborhood Attention Transformer",
https://arxiv.org/abs/2209.15001.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn

from backbones.common.checks import either, one_or_several, text
from backbones.core.base import StagedBackbone
from backbones.core.keywords import WINDOW
from backbones.core.published import imagenet_cfg
from backbones.core.stage import TokenStage, layer_norm, make_stages
from ops.init import init_linear
from ops.neighborhood import NeighborhoodAttention2D
from ops.neighborhood.block import NeighborhoodBlock, resized_bias


class NeighborhoodPyramid(StagedBackbone):
    """The common part of NAT, DiNAT and DiNAT_s.

    Subclasses set ``stem`` and ``stages`` (see :func:`token_stages`), then call :meth:`finish`.
    """

    def finish(
        self,
        dims: Sequence[int],
        global_pool: str,
        drop_rate: float,
        out_norms: bool | Sequence[int],
    ) -> None:
        """Create norm and head, declare the features, and initialise the weights.

        Dense networks (``out_norms`` without classes) have no final norm, like the published ones.
        """
        dense = self.num_classes == 0 and bool(out_norms)
        self.norm = nn.Identity() if dense else layer_norm(dims[-1])
        self.head = ClassifierHead(dims[-1], self.num_classes, global_pool, drop_rate)
        self.describe_features(dims, out_norms=out_norms, out_norm_layer=layer_norm)
        self.apply(init_linear)

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Also resizes position biases to another kernel size."""
        if name.endswith(".rpb"):
            return resized_bias(tensor, shape)
        return super().resize_tensor(name, tensor, shape)


def token_stages(
    dims: Sequence[int],
    num_heads: Sequence[int],
    dilations: Sequence[Sequence[int]],
    kernel_size: int,
    mlp_ratio: float,
    proj_drop_rate: float,
    drop_path_rate: float,
    downsample: Callable[[int, int], nn.Module],
    layer_scale: float | None = None,
) -> nn.Sequential:
    """Stages of neighborhood attention, NCHW to NCHW.

    ``dilations`` are of each block, by stage; ``downsample`` creates the first layer of each stage
    except the first, from the channels of the previous stage and its own.
    """

    def block(i: int, j: int, drop_path: float) -> nn.Module:
        attn = neighborhood(dims[i], num_heads[i], kernel_size, dilations[i][j])
        return NeighborhoodBlock(attn, mlp_ratio, proj_drop_rate, drop_path, layer_scale)

    depths = [len(each) for each in dilations]
    return make_stages(
        depths, drop_path_rate, block, lambda i: downsample(dims[i - 1], dims[i]), TokenStage
    )


def neighborhood(
    dim: int, num_heads: int, kernel_size: int, dilation: int
) -> NeighborhoodAttention2D:
    """Neighborhood attention as published: small maps are padded."""
    return NeighborhoodAttention2D(
        dim, num_heads, kernel_size, dilation=dilation, rel_pos_bias=True, small_maps="pad"
    )


# -- dilations -------------------------------------------------------------------------------------

Pattern = tuple[tuple[int, ...], ...]

# Published dilations by stage. A pattern is repeated or truncated to the stage's depth.
_LARGE = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)
DILATIONS = either(text, str, second=one_or_several(one_or_several(WINDOW)))
PRESETS: Mapping[str, Pattern] = {
    "imagenet": ((1, 8), (1, 4), (1, 2), (1,)),
    "imagenet-384": ((1, 13), (1, 6), (1, 3), (1,)),
    "ade20k": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "ade20k-640": ((1, 20), (1, 5, 1, 10), _LARGE, (1, 2)),
    "coco": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "mask2former": ((1, 14), (1, 4, 1, 7), (*(1, 2, 1, 3) * 4, 1, 3), (1,)),
    "oneformer": ((1, 20), (1, 5, 1, 10), _LARGE, (1, 2)),
    "oneformer-1280": (
        (1, 28),
        (1, 7, 1, 14),
        (1, 3, 1, 5, 1, 5, 1, 7, 1, 3, 1, 5, 1, 5, 1, 7, 1, 7),
        (1, 3),
    ),
    "oneformer-cityscapes": ((1, 18), (1, 5, 1, 9), (1, 2, 1, 3, 1, 4), (1, 2)),
}


def block_dilations(
    dilations: int | str | Sequence[int | Sequence[int]],
    depths: Sequence[int],
    presets: Mapping[str, Pattern],
) -> list[tuple[int, ...]]:
    """The dilation of each block, by stage.

    ``dilations`` are one for all blocks, the name of a preset, or one or a sequence per stage.
    """
    if isinstance(dilations, str):
        if dilations not in presets:
            raise ValueError(
                f"dilations must be one of {', '.join(map(repr, presets))}, or numbers, got "
                f"{dilations!r}"
            )
        if len(depths) > len(presets[dilations]):
            raise ValueError(
                f"dilations {dilations!r} are for {len(presets[dilations])} stages, got depths "
                f"{tuple(depths)}"
            )
        return [
            tuple(pattern[j % len(pattern)] for j in range(depth))
            for pattern, depth in zip(presets[dilations], depths, strict=False)
        ]
    by_stage = (dilations,) * len(depths) if isinstance(dilations, int) else tuple(dilations)
    if len(by_stage) != len(depths):
        raise ValueError(
            f"dilations must have a value or a sequence for each of the {len(depths)} stages of "
            f"depths {tuple(depths)}, got {dilations}"
        )
    found = []
    for stage, (values, depth) in enumerate(zip(by_stage, depths, strict=True)):
        of_blocks = (values,) * depth if isinstance(values, int) else tuple(values)
        if len(of_blocks) != depth:
            raise ValueError(
                f"dilations[{stage}] must have a value for each of the stage's {depth} blocks, got "
                f"{values}"
            )
        found.append(of_blocks)
    return found


# -- published checkpoints -------------------------------------------------------------------------

# The preprocessing of the published weights.
cfg = partial(
    imagenet_cfg,
    url="https://shi-labs.com/projects/{}.pth",
    license="mit",
    origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    paper_name="Dilated Neighborhood Attention Transformer",
    paper_ids="arXiv:2209.15001",
)
