"""Token-aware average pooling: tokens are averaged over neighbourhoods of predicted size.

Yong Guo, David Stutz and Bernt Schiele, "Robustifying Token Attention for Vision Transformers",
https://arxiv.org/abs/2303.11126. Attention that relies on few tokens fails when these are
corrupted; averaging over neighbours makes it more robust.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ops.arguments import checked
from ops.attention.bilevel import BiLevelRoutingAttention
from ops.attention.cascaded import CascadedGroupAttention
from ops.attention.factorized import FactorizedAttention
from ops.attention.hilo import HiLoAttention
from ops.attention.rank_augmented import RankAugmentedAttention
from ops.attention.single_head import SingleHeadAttention
from ops.attention.window import OverlappingWindowAttention, WindowAttention
from ops.batch_norm import BatchNorm2d

__all__ = ["TokenPooling", "pool_tokens_before", "token_attentions"]

_CHANNELS_FIRST = (CascadedGroupAttention, SingleHeadAttention)
_CHANNELS_LAST = (
    BiLevelRoutingAttention,
    FactorizedAttention,
    HiLoAttention,
    OverlappingWindowAttention,
    RankAugmentedAttention,
    WindowAttention,
)


class TokenPooling(nn.Module):
    """Weighted average of the token and 3×3 means with dilation 1 … ``scales`` − 1.

    Two 3×3 convolutions with a batch norm in between predict each token's weights, which sum to 1.
    The map is zero-padded. (B, dim, H, W) → (B, dim, H, W).

    Args:
        dim: channels.
        scales: number of averages, including the token itself; 1 is the identity.
        channels_last: use (B, H, W, dim) for input and output.

    Raises:
        ValueError: ``scales`` is below 1.
    """

    def __init__(self, dim: int, scales: int = 4, *, channels_last: bool = False) -> None:
        super().__init__()
        if scales < 1:
            raise ValueError(f"scales must be 1 or more, got {scales}")
        self.scales = scales
        self.channels_last = channels_last
        self.predictor = nn.Sequential(
            nn.Conv2d(dim, scales, 3, padding=1, bias=False),
            BatchNorm2d(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        shares = self.predictor(x).softmax(dim=1)  # (B, scales, H, W)
        window = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
        out = shares[:, :1] * x
        for dilation in range(1, self.scales):
            mean = F.conv2d(x, window, padding=dilation, dilation=dilation, groups=x.shape[1])
            out = out + shares[:, dilation : dilation + 1] * mean
        return out.permute(0, 2, 3, 1) if self.channels_last else out

    def extra_repr(self) -> str:
        return f"scales={self.scales}, channels_last={self.channels_last}"


@checked()
def token_attentions(model: nn.Module) -> list[nn.Module]:
    """The layers of a network with attention between the tokens of a map."""
    return [m for m in model.modules() if isinstance(m, _CHANNELS_FIRST + _CHANNELS_LAST)]


@checked()
def pool_tokens_before(attention: nn.Module, dim: int, scales: int) -> None:
    """Insert a :class:`TokenPooling` before the input of an attention of :func:`token_attentions`.

    It becomes the layer's ``token_pooling``; other names are unchanged, so published weights fit.
    """
    attention.token_pooling = TokenPooling(
        dim, scales, channels_last=isinstance(attention, _CHANNELS_LAST)
    )
    attention.register_forward_pre_hook(_pool)


def _pool(attention: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook; the map is the first input."""
    return attention.token_pooling(inputs[0]), *inputs[1:]
