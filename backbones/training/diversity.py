"""Attention diversification: a loss that keeps tokens from attending to the same few others.

Yong Guo, David Stutz and Bernt Schiele, "Robustifying Token Attention for Vision Transformers",
https://arxiv.org/abs/2303.11126. The loss is the similarity of each token's attention to the mean
attention, ignoring weak weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from backbones.common.errors import RecipeError

_SOFTMAX = (Tensor.softmax, torch.softmax, F.softmax)


def attention_similarity(weights: Tensor, threshold: float = 2.0) -> Tensor:
    """Similarity of the tokens' attention in a layer: the mean cosine, in 0 … 1.

    Between each token's attention, averaged over the heads, and the average over the tokens; in
    both, weights below ``threshold`` times the uniform weight are set to zero. ``weights`` are
    (…, heads, N, M), or (B, N, M) for one head: attention of N tokens to M keys.
    """
    if weights.ndim > 3:
        weights = weights.mean(dim=-3)
    least = threshold / weights.shape[-1]
    mean = weights.mean(dim=-2, keepdim=True)
    strong_mean, strong = (torch.where(part > least, part, 0) for part in (mean, weights))
    return F.cosine_similarity(strong_mean, strong, dim=-1).mean()


@dataclass
class DiverseAttention:
    """An objective plus the similarity of all attention in the network.

    It intercepts ``scaled_dot_product_attention`` and softmax over keys while the network runs, so
    it works with any network; the weights of fused attention are computed again.
    """

    objective: Callable[..., tuple[Tensor, Any]]  # network, images and targets → loss and logits
    share: float  # weight of the layers' mean similarity; 1 in the paper

    def __call__(self, net: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        """Loss and logits (B, classes) of ``net``."""
        with _Watcher() as watcher:
            loss, logits = self.objective(net, images, targets)
        if not watcher.similarities:
            raise RecipeError(
                "attn_diversity needs a network with softmax attention between tokens"
            )
        return loss + self.share * torch.stack(watcher.similarities).mean(), logits


class _Watcher(TorchFunctionMode):
    """Records the similarity of each attention that is computed with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.similarities: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.is_grad_enabled():
            if func is F.scaled_dot_product_attention:
                self._note(_weights(*args, **kwargs))
            elif func in _SOFTMAX and _over_last(args, kwargs):
                self._note(result)
        return result

    def _note(self, weights: Tensor) -> None:
        # Not defined for a single token or key.
        if weights.ndim >= 3 and min(weights.shape[-2:]) > 1 and weights.requires_grad:
            self.similarities.append(attention_similarity(weights.float()))


def _over_last(args: Any, kwargs: dict[str, Any]) -> bool:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return dim in (-1, args[0].ndim - 1)


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """The attention weights of ``scaled_dot_product_attention``, without dropout."""
    del value, dropout_p
    identity = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device)
    identity = identity.expand(*key.shape[:-1], -1)
    return F.scaled_dot_product_attention(query, key, identity, attn_mask, 0.0, *rest, **options)
