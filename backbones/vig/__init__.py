"""ViG: bidirectional gated linear attention over the map as a sequence.

Bencheng Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
https://arxiv.org/abs/2405.18425. (Not the "Vision GNN" that OpenMMLab calls ViG.) ``vig_*`` keep
stride 16 throughout, ``vig_h_*`` are pyramids.

Accepts any input size from 32×32. The 14×14 position table of ``vig_*`` is interpolated for other
maps. Their published evaluation code halves the mean of the two directions again; accuracies were
measured that way, so this is the default here, unless ``mean_of_directions=True``. Since a norm
follows, only its epsilon makes a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from timm.layers import ClassifierHead, RmsNorm2d
from torch import Tensor, nn

from backbones.core.base import StagedBackbone
from backbones.core.isotropic import IsotropicBackbone
from backbones.core.keywords import checked
from backbones.core.published import VMAMBA_NAMES, children, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import IsotropicStage, TokenStage, layer_norm, make_stages
from backbones.vig.blocks import GatedLinearAttention, gated_mlp
from ops.block import PreNormBlock
from ops.init import init_trunc_normal
from ops.norm import RMSNorm
from ops.patch import ConvLayerNorm
from ops.position import PositionTable

__all__ = ["HierarchicalViG", "ViG"]

_XAVIER_GAIN = 2**-2.5


class Stem(nn.Module):
    """9×9 convolution of stride 8, subsampling by 2, and a position table.

    (B, in_chs, H, W) → (B, dim, ⌈h/2⌉, ⌈w/2⌉) with h = ⌊(H + 1) / 8⌋, w likewise.
    """

    def __init__(self, in_chs: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, dim // 2, 9, 8, padding=1)
        self.norm1 = layer_norm(dim // 2)
        self.act = nn.SiLU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, padding=1)
        self.norm2 = layer_norm(dim)
        self.position = PositionTable(dim, side=14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.position(self.norm2(self.conv2(x)))


_MIXER = (
    (r"\.in_proj\.0\.", ".dwconv."),
    (r"\.qkv_proj\.", ".qkv."),
    *children(r"\.gk_proj", ".decay_down", ".decay_up"),
    (r"\.g_proj\.", ".gate."),
    (r"\.g_norm\.", ".norm."),
    (r"\.l_norm\.", ".local_norm."),
    (r"\.o_proj\.", ".proj."),
)


class ViG(IsotropicBackbone):
    """Isotropic ViG of stride 16. The four stages are groups of its blocks.

    Args:
        act: SiLU inside the attention, see :class:`GatedLinearAttention`.
        mean_of_directions: in eval mode, normalise the mean of the two directions as in training,
            instead of half of it as in the published evaluation.
    """

    first_conv = "stem.conv1"
    renames = (
        *_MIXER,
        *children(
            r"^patch_embed\.proj", "stem.conv1", "stem.norm1", None, "stem.conv2", "stem.norm2"
        ),
        (r"^pos_embed$", "stem.position.pos_embed"),
        (r"\.attn_norm\.", ".norm1."),
        (r"\.mlp_norm\.", ".norm2."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc1."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )

    @checked()
    def __init__(
        self,
        dim: int = 384,
        depths: Sequence[int] = (3, 3, 3, 3),
        num_heads: int = 6,
        act: bool = False,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mean_of_directions: bool = False,
        pyramid: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        share = 0.5 if mean_of_directions else 0.25

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            attn = GatedLinearAttention(dim, num_heads, act, share)
            mlp = gated_mlp(dim, _hidden_dim(dim, 256), proj_drop_rate)
            return PreNormBlock(dim, attn, mlp, partial(RMSNorm, eps=1e-6), drop_path)

        self.stem = Stem(in_chans, dim)
        self.stages = make_stages(depths, drop_path_rate, block, stage_type=IsotropicStage)
        self.norm = RmsNorm2d(dim, eps=1e-6)
        self.head = ClassifierHead(dim, num_classes, global_pool, drop_rate)
        self.describe_blocks(dim, pyramid=pyramid)
        self.apply(_init)


class HierarchicalViG(StagedBackbone):
    """ViG-H, a pyramid."""

    first_conv = "stem.0.conv"
    renames = (
        (r"\.blocks\.(\d+)\.norm\.", r".blocks.\1.norm1."),
        (r"\.op\.", ".attn."),
        *_MIXER,
        *VMAMBA_NAMES,
    )

    @checked("dims", "num_heads")
    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
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

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            attn = GatedLinearAttention(dims[i], num_heads[i])
            mlp = gated_mlp(dims[i], _hidden_dim(dims[i], 32), proj_drop_rate)
            return PreNormBlock(dims[i], attn, mlp, nn.LayerNorm, drop_path)

        self.stem = nn.Sequential(
            ConvLayerNorm(in_chans, dims[0] // 2), nn.GELU(), ConvLayerNorm(dims[0] // 2, dims[0])
        )
        self.stages = make_stages(
            depths, drop_path_rate, block, lambda i: ConvLayerNorm(dims[i - 1], dims[i]), TokenStage
        )
        self.norm = layer_norm(dims[-1])
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate)
        self.describe_features(dims, out_norms=out_norms, out_norm_layer=layer_norm)
        self.apply(_init_hierarchical)


def _hidden_dim(dim: int, multiple: int) -> int:
    """Channels of a gated MLP with about as many weights as a plain one with ratio 4."""
    return -(-(8 * dim // 3) // multiple) * multiple


def _init(module: nn.Module) -> None:
    """Initialise linear layers (normal, std 0.02), and attention and its convolution by Xavier."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, GatedLinearAttention):
        for child in module.children():
            if isinstance(child, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(child.weight, gain=_XAVIER_GAIN)


def _init_hierarchical(module: nn.Module) -> None:
    """Linear layers truncated normal, the attention's convolution by Xavier; others as in torch."""
    if isinstance(module, nn.Linear):
        init_trunc_normal(module)
    elif isinstance(module, GatedLinearAttention):
        nn.init.xavier_uniform_(module.dwconv.weight, gain=_XAVIER_GAIN)


# Published as a folder, https://huggingface.co/hustvl/ViG.
_cfg = imagenet_cfg(
    license="mit",
    origin_url="https://github.com/hustvl/ViG",
    paper_name="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
    paper_ids="arXiv:2405.18425",
)

default_cfgs = {
    **{f"vig_{size}.untrained": _cfg for size in "tsb"},
    **{f"vig_h_{size}.untrained": _cfg for size in "tsb"},
}

vig_t = variant(ViG, dim=192, num_heads=3, act=True)
vig_s = variant(ViG, dim=384, num_heads=6, drop_path_rate=0.2)
vig_b = variant(ViG, dim=768, num_heads=12, drop_path_rate=0.5)
vig_h_t = variant(HierarchicalViG, drop_path_rate=0.2)
vig_h_s = variant(HierarchicalViG, depths=(2, 2, 17, 2), drop_path_rate=0.3)
vig_h_b = variant(
    HierarchicalViG,
    dims=(128, 256, 512, 1024),
    depths=(2, 2, 17, 2),
    num_heads=(4, 8, 16, 32),
    drop_path_rate=0.6,
)

register_variants(__name__)
