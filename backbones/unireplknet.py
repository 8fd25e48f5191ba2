"""UniRepLKNet: few large kernels, re-parameterised from dilated ones, among many small ones.

Xiaohan Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video,
Point Cloud, Time-Series and Image Recognition", https://arxiv.org/abs/2311.15599.

Accepts any input size (from 1×1); the stage at stride s has ⌈H/s⌉ rows. The paper counts parameters
and operations after merging, which is ``fuse()`` here. Merged checkpoints can be loaded into a new
model, which is then fused, or into a fused one. The paper's dense networks use ``num_classes=0,
out_norms=True``; merging these fails in the original and works here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, NormMlpClassifierHead, SqueezeExcite
from torch import Tensor, nn

from backbones.common.checks import one_of
from backbones.core.base import StagedBackbone
from backbones.core.keywords import POOLINGS, SCALE, checked, widths
from backbones.core.published import children, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import make_stages
from ops.batch_norm import BatchNorm2d
from ops.init import init_trunc_normal
from ops.large_kernel import DilatedReparamConv2d
from ops.reparam import fold_norm_after, fold_scale_after, norm_affine

__all__ = ["UniRepLKNet"]


class GlobalResponseNorm(nn.Module):
    """Global response norm: (B, H, W, C) → (B, H, W, C).

    Of ConvNeXt V2, https://arxiv.org/abs/2301.00808. The parameters are 4-D, so that weight decay
    applies to them as in the original; timm's are 1-D. Merging removes the bias.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        energy = x.norm(p=2, dim=(1, 2), keepdim=True)
        share = energy / (energy.mean(dim=-1, keepdim=True) + self.eps)
        x = x * (1 + self.weight * share)
        return x if self.bias is None else x + self.bias


class Block(nn.Module):
    """Depthwise convolution, squeeze-and-excitation, MLP with response norm, scale; residual.

    On (B, dim, H, W). Kernels of 7 and larger are re-parameterised.
    """

    gamma: nn.Parameter | None

    def __init__(self, dim: int, kernel_size: int, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.dwconv: nn.Module = (
            DilatedReparamConv2d(dim, kernel_size)
            if kernel_size >= 7
            else nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        )
        self.norm1: nn.Module = BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, rd_channels=dim // 4)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GlobalResponseNorm(4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)
        self.norm2: nn.Module = BatchNorm2d(dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm1(self.dwconv(x))).permute(0, 2, 3, 1)
        y = self.fc2(self.grn(self.act(self.fc1(y)))).permute(0, 3, 1, 2)
        y = self.norm2(y)
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Merge into one depthwise convolution, and one linear layer after the response norm."""
        if isinstance(self.norm1, nn.BatchNorm2d):
            if isinstance(self.dwconv, DilatedReparamConv2d):
                self.dwconv = self.dwconv.fuse()
            assert isinstance(self.dwconv, nn.Conv2d)
            self.dwconv = fold_norm_after(self.dwconv, self.norm1)
            self.norm1 = nn.Identity()
        if isinstance(self.norm2, nn.BatchNorm2d):
            assert self.grn.bias is not None and self.gamma is not None
            scale, shift = norm_affine(self.norm2)
            shift = shift + scale * (self.fc2.weight @ self.grn.bias.flatten())
            fc2 = fold_scale_after(self.fc2, scale, shift)
            self.fc2 = fold_scale_after(fc2, self.gamma)
            self.norm2 = nn.Identity()
            self.gamma = None
            self.grn.bias = None
        return self


class UniRepLKNet(StagedBackbone):
    """UniRepLKNet.

    Args:
        kernel_sizes: of each stage: one for all its blocks, or a pattern that is repeated.
        head_init_scale: factor on the classifier's initial weights, 0.001 for fine-tuning.
    """

    first_conv = "stem.0"
    renames = (
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^(stages\.\d\.blocks\.\d+)\.norm\.", r"\1.norm1."),
        (r"\.dwconv\.origin_bn\.", ".dwconv.large.norm."),
        (r"\.dwconv\.dil_conv_k(\d+)_(\d+)\.", r".dwconv.branches.k\1_d\2.conv."),
        (r"\.dwconv\.dil_bn_k(\d+)_(\d+)\.", r".dwconv.branches.k\1_d\2.norm."),
        (r"\.se\.down\.", ".se.fc1."),
        (r"\.se\.up\.", ".se.fc2."),
        (r"\.pwconv1\.1\.", ".fc1."),
        (r"\.act\.1\.gamma$", ".grn.weight"),
        (r"\.act\.1\.beta$", ".grn.bias"),
        *children(r"\.pwconv2", ".fc2", None, ".norm2"),
        (r"^norm(\d)\.", r"out_norms.\1."),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
    classifies_maps = True
    # The head's norm has the width of the map.
    poolings = tuple(pool for pool in POOLINGS if "cat" not in pool)

    @checked(
        "dims", "kernel_sizes", dims=widths(2), global_pool=one_of(*poolings), head_init_scale=SCALE
    )
    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 27, 3),
        kernel_sizes: Sequence[int | Sequence[int]] = (3, 13, (13, 3, 3), 13),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-6,
        head_init_scale: float = 1.0,
        out_norms: bool | Sequence[int] = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        patterns = [(each,) if isinstance(each, int) else each for each in kernel_sizes]
        half = dims[0] // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, 2, 1),
            LayerNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, dims[0], 3, 2, 1),
            LayerNorm2d(dims[0]),
        )
        self.stages = make_stages(
            depths,
            drop_path_rate,
            lambda i, j, rate: Block(dims[i], patterns[i][j % len(patterns[i])], rate, layer_scale),
            lambda i: nn.Sequential(nn.Conv2d(dims[i - 1], dims[i], 3, 2, 1), LayerNorm2d(dims[i])),
        )
        self.norm = nn.Identity()
        self.head = NormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        if num_classes == 0 and out_norms:
            self.head.norm = nn.Identity()
        self.describe_features(dims, out_norms=out_norms)
        self.apply(init_trunc_normal)
        if num_classes:
            with torch.no_grad():
                self.head.fc.weight *= head_init_scale
                self.head.fc.bias *= head_init_scale

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Like the base's, but grouping three blocks per layer, as in the published fine-tuning."""
        matcher = super().group_matcher(coarse)
        if not coarse:
            depths = [len(list(stage.get_submodule("blocks").children())) for stage in self.stages]
            threes = [
                (rf"^stages\.({i})\.blocks\.(?:{j}|{j + 1}|{j + 2})\.", (j // 3,))
                for i, depth in enumerate(depths)
                for j in range(0, depth, 3)
            ]
            matcher["blocks"] = threes + matcher["blocks"]
        return matcher

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Like the base's, of the original merged or not."""
        converted = super().convert_state_dict(state_dict)
        if any(key.endswith(".lk_origin.bias") for key in converted):
            return {key.replace(".lk_origin.", "."): t for key, t in converted.items()}
        return {key.replace(".lk_origin.", ".large.conv."): t for key, t in converted.items()}


_cfg = partial(
    imagenet_cfg,
    url="https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/unireplknet_{}.pth",
    license="apache-2.0",
    origin_url="https://github.com/AILab-CVC/UniRepLKNet",
    paper_name=(
        "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, "
        "Time-Series and Image Recognition"
    ),
    paper_ids="arXiv:2311.15599",
)
_cfg_384 = partial(_cfg, input_size=(3, 384, 384), crop_pct=1.0, crop_mode="squash")
_cfg_22k = partial(_cfg, num_classes=21841)

default_cfgs = {
    "unireplknet_a.in1k": _cfg("a_in1k_224_acc77.03"),
    "unireplknet_f.in1k": _cfg("f_in1k_224_acc78.58"),
    "unireplknet_p.in1k": _cfg("p_in1k_224_acc80.23"),
    "unireplknet_n.in1k": _cfg("n_in1k_224_acc81.64"),
    "unireplknet_t.in1k": _cfg("t_in1k_224_acc83.21"),
    "unireplknet_s.in1k": _cfg("s_in1k_224_acc83.91"),
    "unireplknet_s.in22k_ft_in1k_384": _cfg_384("s_in22k_to_in1k_384_acc86.44"),
    "unireplknet_s.in22k": _cfg_22k("s_in22k_pretrain"),
    "unireplknet_b.in22k_ft_in1k_384": _cfg_384("b_in22k_to_in1k_384_acc87.40"),
    "unireplknet_b.in22k": _cfg_22k("b_in22k_pretrain"),
    "unireplknet_b_k400.untrained": _cfg(
        url="", num_classes=400, input_size=(3, 896, 896), crop_pct=1.0
    ),
    "unireplknet_l.in22k_ft_in1k_384": _cfg_384("l_in22k_to_in1k_384_acc87.88"),
    "unireplknet_l.in22k": _cfg_22k("l_in22k_pretrain", input_size=(3, 192, 192)),
    "unireplknet_xl.in22k_ft_in1k_384": _cfg_384("xl_in22k_to_in1k_384_acc87.96"),
    "unireplknet_xl.in22k": _cfg_22k("xl_in22k_pretrain", input_size=(3, 192, 192)),
}

_LIGHT: dict[str, Any] = dict(depths=(2, 2, 6, 2), kernel_sizes=(3, 13, 13, 13))

unireplknet_a = variant(UniRepLKNet, dims=(40, 80, 160, 320), **_LIGHT)
unireplknet_f = variant(UniRepLKNet, dims=(48, 96, 192, 384), **_LIGHT)
unireplknet_p = variant(UniRepLKNet, dims=(64, 128, 256, 512), **_LIGHT, drop_path_rate=0.1)
unireplknet_n = variant(
    UniRepLKNet,
    dims=(80, 160, 320, 640),
    depths=(2, 2, 8, 2),
    kernel_sizes=(3, 13, 13, 13),
    drop_path_rate=0.1,
)
unireplknet_t = variant(
    UniRepLKNet,
    dims=(80, 160, 320, 640),
    depths=(3, 3, 18, 3),
    kernel_sizes=(3, 13, (13, 3), 13),
    drop_path_rate=0.2,
)
unireplknet_s = variant(UniRepLKNet, dims=(96, 192, 384, 768), drop_path_rate=0.4)
# Stochastic depth of B, L and XL is that of the fine-tuning at 384×384.
unireplknet_b = variant(UniRepLKNet, dims=(128, 256, 512, 1024), drop_path_rate=0.2)
# For video: Kinetics-400, 16 frames as one image (ops.frames.frames_to_image),
# kernels of 11 in stage 4; the authors published no weights
unireplknet_b_k400 = variant(
    UniRepLKNet,
    dims=(128, 256, 512, 1024),
    kernel_sizes=(3, 13, (13, 3, 3), 11),
    drop_path_rate=0.4,
)
unireplknet_l = variant(UniRepLKNet, dims=(192, 384, 768, 1536), drop_path_rate=0.3)
unireplknet_xl = variant(UniRepLKNet, dims=(256, 512, 1024, 2048), drop_path_rate=0.3)

register_variants(__name__)
