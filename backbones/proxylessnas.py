"""ProxylessNAS: inverted bottlenecks chosen by a search for the latency of a device.

Han Cai et al., "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware",
https://arxiv.org/abs/1812.00332.

Accepts any input size from 32×32; the stage at stride s has ⌈H/s⌉ rows. Blocks that the search left
out are identities, so that the others keep their numbers. Batch norms have an eps of 1e-3, on which
the published weights depend.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from backbones.common.checks import several, whole
from backbones.core.base import StagedBackbone
from backbones.core.keywords import checked
from backbones.core.published import children, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import channels_before, make_stages
from ops.conv import ConvNorm
from ops.mobile import MBConv, MixHead

__all__ = ["ProxylessNAS"]


class ProxylessNAS(StagedBackbone):
    """ProxylessNAS.

    Args:
        dims: output channels of each block, by stage. The first block of a stage halves the map,
            except in the first stage, which has stride 2 and belongs to the stem.
        kernel_sizes: of each depthwise convolution; 0 to omit the block.
        expansions: hidden channels of each block relative to its input; 0 for omitted blocks.
    """

    first_conv = "stem.0.conv"

    @checked(kernel_sizes=several(several(whole(0, 63))), expansions=several(several(whole(0, 64))))
    def __init__(
        self,
        stem_dim: int = 32,
        dims: Sequence[Sequence[int]] = (
            (16,),
            (32,) * 4,
            (40,) * 4,
            (80,) * 4 + (96,) * 4,
            (192,) * 4 + (320,),
        ),
        kernel_sizes: Sequence[Sequence[int]] = (
            (3,),
            (5, 3, 0, 0),
            (7, 3, 5, 5),
            (7, 5, 5, 5, 5, 5, 5, 5),
            (7, 7, 7, 7, 7),
        ),
        expansions: Sequence[Sequence[int]] = (
            (1,),
            (3, 3, 0, 0),
            (3, 3, 3, 3),
            (6, 3, 3, 3, 6, 3, 3, 3),
            (6, 6, 3, 3, 6),
        ),
        head_hidden_dim: int = 1280,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        norm_eps: float = 1e-3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        stem_features: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        depths = tuple(len(stage) for stage in dims)
        for name, values in (("kernel_sizes", kernel_sizes), ("expansions", expansions)):
            if tuple(len(stage) for stage in values) != depths:
                raise ValueError(f"{name} must have the shape of dims {dims}, got {values}")
        if depths[0] != 1 or len(dims) < 2:
            raise ValueError(f"dims must have one block at stride 2, then other stages, got {dims}")

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            dim, out_dim = channels_before(stem_dim, dims, i, j), dims[i][j]
            stride = 2 if i and not j else 1
            kernel_size, expansion = kernel_sizes[i][j], expansions[i][j]
            if kernel_size == expansion == 0:  # the search left it out
                if stride != 1 or dim != out_dim:
                    raise ValueError(
                        f"a block of stride {stride} from {dim} to {out_dim} channels cannot be "
                        "omitted"
                    )
                return nn.Identity()
            if kernel_size % 2 == 0 or not expansion:
                raise ValueError(
                    "a block needs an odd kernel size and an expansion of 1 or more (or 0 for "
                    f"both, to omit it), got {kernel_size} and {expansion}"
                )
            return MBConv(
                dim, out_dim, kernel_size, expansion, stride, norm_eps=norm_eps, drop_path=drop_path
            )

        made: Any = make_stages(depths, drop_path_rate, block)
        first = ConvNorm(in_chans, stem_dim, 3, 2, norm_eps=norm_eps, act_layer=nn.ReLU6)
        self.stem = nn.Sequential(first, *made[0].blocks)
        self.stages = nn.Sequential(*made[1:])
        self.norm = nn.Identity()
        widths = [stage[-1] for stage in dims]
        self.head = MixHead(
            widths[-1], head_hidden_dim, num_classes, global_pool, drop_rate, norm_eps
        )
        self.describe_features(
            widths[1:],
            head_hidden_size=head_hidden_dim,
            stem_features=((1, widths[0], 2),) if stem_features else (),
        )
        # The original counts blocks through all stages.
        blocks = [f"stages.{i}.blocks.{j}" for i, n in enumerate(depths[1:]) for j in range(n)]
        self.renames = (*_RENAMES, *children("^blocks", "stem.1", *blocks))


_RENAMES = (
    (r"^first_conv\.", "stem.0."),
    (r"^feature_mix_layer\.", "head.mix."),
    (r"^classifier\.linear\.", "head.fc."),
    (r"\.mobile_inverted_conv\.", "."),
    (r"\.inverted_bottleneck\.", ".expand."),
    (r"\.depth_conv\.", ".dwconv."),
    (r"\.point_linear\.", ".project."),
    (r"\.bn\.", ".norm."),
)

_cfg = partial(
    imagenet_cfg,
    url="https://raw.githubusercontent.com/han-cai/files/master/proxylessnas/{}.pth",
    interpolation="bilinear",
    license="mit",
    origin_url="https://github.com/mit-han-lab/proxylessnas",
    paper_name="ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware",
    paper_ids="arXiv:1812.00332",
)

default_cfgs = {
    f"{variant}.in1k": _cfg(variant)
    for variant in ("proxyless_cpu", "proxyless_gpu", "proxyless_mobile", "proxyless_mobile_14")
}

proxyless_cpu = variant(
    ProxylessNAS,
    stem_dim=40,
    dims=((24,), (32,) * 4, (48,) * 4, (88,) * 4 + (104,) * 4, (216,) * 4 + (360,)),
    kernel_sizes=((3,), (3, 3, 3, 3), (3, 3, 3, 5), (3, 0, 0, 3, 5, 3, 3, 3), (5, 5, 5, 3, 5)),
    expansions=((1,), (6, 3, 3, 3), (6, 3, 3, 3), (6, 0, 0, 3, 6, 3, 3, 3), (6, 3, 3, 3, 6)),
    head_hidden_dim=1432,
)
proxyless_gpu = variant(
    ProxylessNAS,
    stem_dim=40,
    dims=((24,), (32,) * 4, (56,) * 4, (112,) * 4 + (128,) * 4, (256,) * 4 + (432,)),
    kernel_sizes=((3,), (5, 0, 0, 0), (7, 0, 0, 3), (7, 0, 0, 5, 5, 0, 3, 5), (7, 7, 7, 5, 7)),
    expansions=((1,), (3, 0, 0, 0), (3, 0, 0, 3), (6, 0, 0, 3, 6, 0, 3, 3), (6, 6, 6, 6, 6)),
    head_hidden_dim=1728,
)
proxyless_mobile = variant(ProxylessNAS)
proxyless_mobile_14 = variant(
    ProxylessNAS,
    stem_dim=48,
    dims=((24,), (40,) * 4, (56,) * 4, (112,) * 4 + (136,) * 4, (256,) * 4 + (448,)),
    head_hidden_dim=1792,
)

register_variants(__name__)
