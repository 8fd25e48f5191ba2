"""Vision-RWKV: an isotropic network of stride 16 that mixes tokens by scans at linear cost.

Yuchen Duan et al., "Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like
Architectures", https://arxiv.org/abs/2403.02308. ``vrwkv_*`` scan by bi-WKV, ``vrwkv6_*`` by gated
linear attention; the parts are in :mod:`backbones.vrwkv.blocks`.

Accepts any input size from 32×32, zero-padded to a multiple of 16; the position table is
interpolated. The CUDA kernel that the published ``vrwkv_*`` were trained with deviates from the
paper's formula by segments of the sequence. The default here reproduces that kernel,
``segments=32`` (16 for ``vrwkv_l``); ``segments=0`` is the formula. See :func:`ops.bi_wkv.bi_wkv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, NormMlpClassifierHead
from torch import Tensor, nn

from backbones.common.checks import several, whole
from backbones.core.isotropic import IsotropicBackbone
from backbones.core.keywords import BLOCKS, checked
from backbones.core.published import children, imagenet_cfg
from backbones.core.registry import register_variants, variant
from backbones.core.stage import IsotropicStage, layer_norm, make_stages
from backbones.vrwkv.blocks import HEAD_DIM, Block, GatedScan, GatedSquaredMlp, WKVAttention
from ops.init import init_trunc_normal
from ops.position import PositionTable

__all__ = ["VRWKV"]

_PATCH = 16


class PatchEmbed(nn.Module):
    """Patches of 16×16 and a position table, normalised.

    (B, in_chs, H, W) → (B, dim, ⌈H/16⌉, ⌈W/16⌉); ``table_size`` is the position table's side.
    """

    def __init__(self, in_chs: int, dim: int, table_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, dim, _PATCH, _PATCH)
        self.position = PositionTable(dim, table_size, std=0)
        self.norm = layer_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Without the norm."""
        x = self.conv(F.pad(x, (0, -x.shape[3] % _PATCH, 0, -x.shape[2] % _PATCH)))
        return self.position(x)


class VRWKV(IsotropicBackbone):
    """Vision-RWKV, stride 16 throughout. The four stages are groups of its blocks.

    Args:
        dim: of all blocks, a multiple of 4; of 64 with ``gated``.
        gated: VRWKV6, see :class:`backbones.vrwkv.blocks.GatedScan`.
        segments: of the scan without ``gated``: the published kernel's 32 or 16; 0 for the paper's
            formula.
        post_norm: post-norm instead of pre-norm blocks.
        key_norm: additional norms inside the blocks' parts.
        img_size: image size of the position table, which is interpolated for other sizes.
        head_hidden_dim: width of a tanh layer before the classifier; None for none.
    """

    renames = (
        (r"^patch_embed\.projection\.", "stem.conv."),
        (r"^pos_embed$", "stem.position.pos_embed"),
        (r"^stages\.0\.blocks\.0\.ln0\.", "stem.norm."),
        (r"^ln1\.", "norm."),
        (r"\.ln([12])\.", r".norm\1."),
        (r"\.gamma([12])$", r".ls\1.gamma"),
        (r"\.att\.", ".attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.(?:key_norm|ln_x)\.", ".norm."),
        (r"\.output\.", ".proj."),
        (r"\.(?:spatial|time)_(decay|first|mix)", r".\1"),
        (r"\.time_faaaa$", ".first"),
        (r"\.time_maa_([xwkvrg])$", r".mix_\1"),
        (r"\.time_maa_w1$", ".mix_down"),
        (r"\.time_maa_w2$", ".mix_up"),
        (r"\.decay_w1$", ".decay_down"),
        (r"\.decay_w2$", ".decay_up"),
        *children("^head", "head.pre_logits.fc", None, "head.fc"),
    )

    @checked(depths=several(BLOCKS, count=4), segments=whole(0, 1 << 20))
    def __init__(
        self,
        dim: int = 192,
        depths: Sequence[int] = (3, 3, 3, 3),
        mlp_ratio: float = 4,
        *,
        gated: bool = False,
        segments: int = 32,
        post_norm: bool = False,
        key_norm: bool = False,
        layer_scale: float | None = None,
        img_size: int = 224,
        head_hidden_dim: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pyramid: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        multiple = HEAD_DIM if gated else 4
        if dim % multiple:
            raise ValueError(f"dim must be a multiple of {multiple}, got {dim}")
        hidden_dim, groups = int(dim * mlp_ratio), dim // HEAD_DIM if gated else 1

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            attn = GatedScan(dim) if gated else WKVAttention(dim, segments, key_norm)
            mlp = GatedSquaredMlp(dim, hidden_dim, groups, key_norm, proj_drop_rate)
            return Block(dim, attn, mlp, post_norm, layer_scale, drop_path)

        self.stem = PatchEmbed(in_chans, dim, -(-img_size // _PATCH))
        self.stages = make_stages(depths, drop_path_rate, block, stage_type=IsotropicStage)
        self.norm = layer_norm(dim)
        if head_hidden_dim is None:
            self.head = ClassifierHead(dim, num_classes, global_pool, drop_rate)
        else:
            self.head = NormMlpClassifierHead(
                dim, num_classes, head_hidden_dim, global_pool, drop_rate, nn.Identity
            )
        self.describe_blocks(dim, pyramid=pyramid)
        self.head_hidden_size = head_hidden_dim or dim
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_trunc_normal(module)
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        part: Any
        for layer, each in enumerate(blocks):
            for part in (each.attn, each.mlp):
                part.init_weights(layer, len(blocks))

    def embed(self, x: Tensor) -> Tensor:
        """Without the stem's norm, with which the original's first block begins."""
        stem: Any = self.stem
        return stem.embed(x)

    def after_embed(self, x: Tensor) -> Tensor:
        """The stem's norm."""
        stem: Any = self.stem
        return stem.norm(x)

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Like the base's; a network without layer scales is one with scales of 1."""
        converted = super().convert_state_dict(state_dict)
        own = self.state_dict()
        scales = [name for name in own if name.endswith((".ls1.gamma", ".ls2.gamma"))]
        if own.keys() & converted.keys() and not any(name in converted for name in scales):
            converted |= {name: torch.ones(own[name].shape) for name in scales}
        return converted


_cfg = partial(
    imagenet_cfg,
    url="https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/{}.pth",
    license="apache-2.0",
    origin_url="https://github.com/OpenGVLab/Vision-RWKV",
    paper_name="Vision-RWKV",
    paper_ids="arXiv:2403.02308",
)

default_cfgs = {
    **{f"vrwkv_{size}.in1k": _cfg(f"vrwkv_{size}_in1k_224") for size in "tsb"},
    "vrwkv_l.in22k_ft_in1k": _cfg("vrwkv_l_22kto1k_384", input_size=(3, 384, 384), crop_pct=1.0),
    **{f"vrwkv6_{size}.in1k": _cfg(f"vrwkv6_{size}_in1k_224") for size in "tsb"},
}

vrwkv_t = variant(VRWKV, dim=192)
vrwkv_s = variant(VRWKV, dim=384, post_norm=True, layer_scale=1.0, drop_path_rate=0.3)
vrwkv_b = variant(VRWKV, dim=768, post_norm=True, layer_scale=1e-5, drop_path_rate=0.5)
# Its images are 384×384, and its position table is of 192×192.
vrwkv_l = variant(
    VRWKV,
    dim=1024,
    depths=(6, 6, 6, 6),
    segments=16,
    post_norm=True,
    key_norm=True,
    layer_scale=1e-5,
    img_size=192,
    head_hidden_dim=3072,
    drop_path_rate=0.1,
)
vrwkv6_t = variant(VRWKV, dim=192, gated=True)
vrwkv6_s = variant(VRWKV, dim=384, gated=True, post_norm=True, layer_scale=1e-5, drop_path_rate=0.3)
vrwkv6_b = variant(VRWKV, dim=768, gated=True, post_norm=True, layer_scale=1e-5, drop_path_rate=0.5)

register_variants(__name__)
