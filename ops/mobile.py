"""Parts of networks for low latency. All convolutions have batch norms that can be folded.

Of EfficientViT and SHViT, which start at stride 16 and whose residual branches are initialised to
zero, https://arxiv.org/abs/2305.07027 and https://arxiv.org/abs/2401.16456, and of the mobile
networks after MobileNetV2, https://arxiv.org/abs/1801.04381.
"""

from __future__ import annotations

import torch
from timm.layers import ClassifierHead, DropPath, SelectAdaptivePool2d, SqueezeExcite
from torch import Tensor, nn

from ops.arguments import checked
from ops.conv import ConvNorm, ConvResidual, NormLinear
from ops.init import trunc_normal

__all__ = [
    "ConvFFN",
    "ExpandMerging",
    "MBConv",
    "MixHead",
    "NormLinearHead",
    "Residual",
    "conv_stem",
    "residual_merging",
]


@checked(least={"dim": 8})
def conv_stem(in_chans: int, dim: int) -> nn.Sequential:
    """Four 3×3 convolutions of stride 2: (B, in_chans, H, W) → (B, dim, ⌈H/16⌉, ⌈W/16⌉).

    Child i has stride ``2 ** (i + 1)`` and ``dim // 2 ** (3 - i)`` channels.
    """
    dims = (in_chans, dim // 8, dim // 4, dim // 2, dim)
    return nn.Sequential(
        *(
            ConvNorm(dims[i], dims[i + 1], 3, 2, act_layer=nn.ReLU if i < 3 else None)
            for i in range(4)
        )
    )


class Residual(nn.Module):
    """``x + drop_path(fn(x))``."""

    def __init__(self, fn: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.fn = fn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fn(x))


class ConvFFN(nn.Module):
    """Pointwise, ReLU, pointwise: (B, dim, H, W) → (B, dim, H, W)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden_dim)
        self.act = nn.ReLU()
        self.fc2 = ConvNorm(hidden_dim, dim, norm_scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ExpandMerging(nn.Module):
    """Downsampling by an inverted bottleneck with squeeze-and-excitation.

    (B, dim, H, W) → (B, out_dim, ⌈H/2⌉, ⌈W/2⌉); ``4 * dim`` channels inside.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden_dim = 4 * dim
        self.expand = ConvNorm(dim, hidden_dim)
        self.act = nn.ReLU()
        self.reduce = ConvNorm(hidden_dim, hidden_dim, 3, 2, groups=hidden_dim)
        self.se = SqueezeExcite(hidden_dim, rd_ratio=0.25)
        self.project = ConvNorm(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.reduce(self.act(self.expand(x))))
        return self.project(self.se(x))


@checked()
def residual_merging(dim: int, out_dim: int) -> nn.Sequential:
    """:class:`ExpandMerging` between residual pairs of depthwise convolution and feed-forward.

    (B, dim, H, W) → (B, out_dim, ⌈H/2⌉, ⌈W/2⌉).
    """
    return nn.Sequential(
        ConvResidual(dim, norm_scale=1.0),
        Residual(ConvFFN(dim, 2 * dim)),
        ExpandMerging(dim, out_dim),
        ConvResidual(out_dim, norm_scale=1.0),
        Residual(ConvFFN(out_dim, 2 * out_dim)),
    )


class MBConv(nn.Module):
    """Pointwise, depthwise, pointwise, each with a batch norm, and a shortcut if shapes match.

    ReLU6 follows the first two. (B, dim, H, W) → (B, out_dim, ⌈H / stride⌉, ⌈W / stride⌉), with
    ``dim * expansion`` hidden channels; with an expansion of 1, there is no first layer.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int,
        expansion: int,
        stride: int = 1,
        *,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_dim = dim * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = ConvNorm(dim, hidden_dim, norm_eps=norm_eps, act_layer=nn.ReLU6)
        self.dwconv = ConvNorm(
            hidden_dim,
            hidden_dim,
            kernel_size,
            stride,
            groups=hidden_dim,
            norm_eps=norm_eps,
            act_layer=nn.ReLU6,
        )
        self.project = ConvNorm(hidden_dim, out_dim, norm_eps=norm_eps)
        self.drop_path = DropPath(drop_path)
        self.has_shortcut = stride == 1 and dim == out_dim

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.dwconv(self.expand(x)))
        return x + self.drop_path(out) if self.has_shortcut else out


class MixHead(ClassifierHead):
    """A pointwise convolution with batch norm and ReLU6, then pooling and a linear layer.

    Without pooling, it returns its input. (B, dim, H, W) → (B, num_classes).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_classes: int,
        pool_type: str,
        drop_rate: float,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_dim, num_classes, pool_type, drop_rate)
        self._mix = dim, hidden_dim, norm_eps
        self.mix = self._new_mix(pool_type)

    def _new_mix(self, pool_type: str) -> nn.Module:
        if not pool_type:
            return nn.Identity()
        dim, hidden_dim, norm_eps = self._mix
        return ConvNorm(dim, hidden_dim, norm_eps=norm_eps, act_layer=nn.ReLU6)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifier and, if given, the pooling."""
        before = self.global_pool.pool_type
        super().reset(num_classes, pool_type)
        if pool_type is not None and bool(pool_type) != bool(before):
            self.mix = self._new_mix(pool_type)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        out: Tensor = super().forward(self.mix(x), pre_logits)
        return out


class NormLinearHead(nn.Module):
    """Pooling, followed by a batch norm and a linear classifier.

    (B, in_features, H, W) → (B, num_classes).

    Args:
        num_classes: 0 returns the pooled features.
        pool_type: of timm's ``SelectAdaptivePool2d``; ``""`` for none.
        drop_rate: dropout before the classifier.
        distilled: add a second classifier ``fc_dist`` for a teacher's labels. In training mode,
            the head returns both logits, in eval mode their mean.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        *,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.distilled = distilled
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the classifiers and, if given, the pooling."""
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        width = self.in_features * self.global_pool.feat_mult()
        self.fc = _classifier(width, num_classes)
        if self.distilled:
            self.fc_dist = _classifier(width, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = self.drop(self.global_pool(x))
        if pre_logits:
            return x
        if not self.distilled:
            return self.fc(x)
        logits = torch.stack((self.fc(x), self.fc_dist(x)))
        return (logits[0], logits[1]) if self.training else logits.mean(0)


def _classifier(in_features: int, num_classes: int) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    classifier = NormLinear(in_features, num_classes)
    trunc_normal(classifier.linear.weight)
    nn.init.zeros_(classifier.linear.bias)
    return classifier
