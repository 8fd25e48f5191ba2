"""EfficientViT (MSRA): sandwiches of feed-forwards around cascaded group attention in windows.

Xinyu Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group
Attention", https://arxiv.org/abs/2305.07027.

Accepts any input size (from 1×1); the stage at stride s has ⌈H/s⌉ rows. The original's classifier
runs only at the size that it was built for, and its dense copy fails if the last map is smaller
than a window; here, the biases are interpolated to the actual window. Otherwise, the outputs equal
the original's. The paper's dense networks use ``img_size=448`` (their tables are 7×7 in all
stages), and ``kernel_sizes=(7, 5, 3, 3)`` for M0. Stages start at stride 16; with
``stem_features=True``, the stem's maps at strides 2, 4 and 8 precede the other features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from backbones.core.base import StagedBackbone
from backbones.core.keywords import checked, widths
from backbones.core.published import FAST_BLOCKS, FAST_NAMES, imagenet_cfg, renamed
from backbones.core.registry import register_variants, variant
from backbones.core.stage import make_stages
from ops.attention.cascaded import CascadedGroupAttention, resize_distance_table
from ops.conv import ConvResidual
from ops.mobile import ConvFFN, NormLinearHead, Residual, conv_stem, residual_merging

__all__ = ["EfficientViT"]


class Block(nn.Module):
    """Attention between two pairs of convolution and feed-forward, residual, on (B, dim, H, W)."""

    def __init__(self, dim: int, attn: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = ConvResidual(dim, drop_path=drop_path)
        self.ffn1 = Residual(ConvFFN(dim, 2 * dim), drop_path)
        self.attn = Residual(attn, drop_path)
        self.conv2 = ConvResidual(dim, drop_path=drop_path)
        self.ffn2 = Residual(ConvFFN(dim, 2 * dim), drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn2(self.conv2(self.attn(self.ffn1(self.conv1(x)))))


class EfficientViT(StagedBackbone):
    """EfficientViT.

    Args:
        kernel_sizes: of the depthwise convolutions of the queries, one per head.
        qk_dim: width of query and key of a head.
        window_size: side of the attention windows.
        img_size: square image size that the bias tables are for; a table's side is that of the
            stage's map, at most ``window_size``. Other sizes use interpolated biases, and tables
            in checkpoints are interpolated when loaded.
        distilled: add a second classifier for a teacher's labels, see
            :class:`ops.mobile.NormLinearHead`.
    """

    classifier: str | tuple[str, ...] = "head.fc"
    first_conv = "stem.0.conv"
    undecayed = ("attention_biases",)
    # After FAST_BLOCKS.
    renames = (
        (r".*attention_bias_idxs$", ""),  # constants
        (r"\.(dw[01]|downsample\.[03])\.m\.(?=weight$|bias$)", r".\1."),
        (r"\.c\.", ".conv."),
        (r"\.bn\.", ".norm."),
        (r"\.dw0\.", ".conv1."),
        (r"\.dw1\.", ".conv2."),
        (r"\.ffn0\.m\.", ".ffn1.fn."),
        (r"\.ffn1\.m\.", ".ffn2.fn."),
        (r"\.mixer\.m\.attn\.", ".attn.fn."),
        (r"\.m\.", ".fn."),
        (r"\.pw([12])\.", r".fc\1."),
        (r"\.qkvs\.(\d+)\.", r".heads.\1.qkv."),
        (r"\.dws\.(\d+)\.", r".heads.\1.dwconv."),
        (r"\.proj\.1\.", ".proj."),
        *FAST_NAMES,
    )

    @checked("dims", "num_heads", dims=widths(8))
    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 192),
        depths: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        kernel_sizes: Sequence[int] = (7, 5, 3, 3),
        *,
        qk_dim: int = 16,
        window_size: int = 7,
        img_size: int = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distilled: bool = False,
        stem_features: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans)
        reductions = [16 * 2**i for i in range(len(dims))]

        def block(i: int, j: int, drop_path: float) -> nn.Module:
            table_size = min(window_size, -(-img_size // reductions[i]))
            attn = CascadedGroupAttention(
                dims[i], num_heads[i], qk_dim, window_size, kernel_sizes, table_size
            )
            return Block(dims[i], attn, drop_path)

        self.stem = conv_stem(in_chans, dims[0])
        self.stages = make_stages(
            depths, drop_path_rate, block, lambda i: residual_merging(dims[i - 1], dims[i])
        )
        self.norm = nn.Identity()
        self.head = NormLinearHead(
            dims[-1], num_classes, global_pool, drop_rate, distilled=distilled
        )
        if distilled:
            self.classifier = ("head.fc", "head.fc_dist")
        taps = [(i, dims[0] // 2 ** (3 - i), 2 ** (i + 1)) for i in range(3)]
        self.describe_features(dims, reductions, stem_features=taps if stem_features else ())

    def convert_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts the names of the original, fused or not, and of timm.

        The original fuses only the norms of depthwise convolutions; our kernels also include the
        identity.
        """
        tensors = {renamed(key, FAST_BLOCKS): tensor for key, tensor in state_dict.items()}
        for key, tensor in tensors.items():
            if re.search(r"\.(?:dw[01]|downsample\.[03])\.m\.weight$", key):
                tensors[key] = _add_identity(tensor)
        return super().convert_state_dict(tensors)

    def resize_tensor(self, name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
        """Also resizes tables of attention biases, bicubically like the paper's detectors."""
        if name.endswith(".attention_biases") and tensor.ndim == 2 and len(tensor) == shape[0]:
            old, new = (round(n**0.5) for n in (tensor.shape[1], shape[1]))
            if old * old == tensor.shape[1]:
                table = tensor.unflatten(1, (old, old))
                return resize_distance_table(table, new, new).flatten(1)
        return super().resize_tensor(name, tensor, shape)


def _add_identity(kernel: Tensor) -> Tensor:
    identity = torch.zeros_like(kernel)
    identity[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2] = 1
    return kernel + identity


_cfg = partial(
    imagenet_cfg,
    url="https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0/{}.pth",
    license="mit",
    origin_url="https://github.com/microsoft/Cream/tree/main/EfficientViT",
    paper_name="EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention",
    paper_ids="arXiv:2305.07027",
)

default_cfgs = {f"efficientvit_m{i}.in1k": _cfg(f"efficientvit_m{i}") for i in range(6)}

efficientvit_m0 = variant(EfficientViT, kernel_sizes=(5, 5, 5, 5))
efficientvit_m1 = variant(EfficientViT, dims=(128, 144, 192), num_heads=(2, 3, 3))
efficientvit_m2 = variant(EfficientViT, dims=(128, 192, 224), num_heads=(4, 3, 2))
efficientvit_m3 = variant(
    EfficientViT, dims=(128, 240, 320), num_heads=(4, 3, 4), kernel_sizes=(5, 5, 5, 5)
)
efficientvit_m4 = variant(EfficientViT, dims=(128, 256, 384), num_heads=(4, 4, 4))
efficientvit_m5 = variant(EfficientViT, dims=(192, 288, 384), depths=(1, 3, 4), num_heads=(3, 3, 4))

register_variants(__name__)
