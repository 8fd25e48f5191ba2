"""Attention diversification: the similarity, and which attention is included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import images, small

from backbones.common.errors import RecipeError
from backbones.training.build import build_objective
from backbones.training.command_line import load_recipe
from backbones.training.diversity import DiverseAttention, attention_similarity

ANSWERS = torch.tensor([0, 1])


def _cross_entropy(net: nn.Module, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = net(x)
    return F.cross_entropy(logits, targets), logits


def test_similarity_is_the_formula():
    torch.manual_seed(0)
    weights = (3 * torch.randn(3, 2, 5, 7)).softmax(-1)
    heads = weights.mean(1)
    mean = heads.mean(1, keepdim=True)
    kept, mean = (t * (t > 2 / 7) for t in (heads, mean))
    cosines = (kept * mean).sum(-1) / (kept.norm(dim=-1) * mean.norm(dim=-1)).clamp(min=1e-8)
    torch.testing.assert_close(attention_similarity(weights), cosines.mean())


class _Attention(nn.Module):
    """Attention with a mask and a scale, by torch's function or by hand."""

    def __init__(self, by_hand: bool, mask: Tensor) -> None:
        super().__init__()
        self.by_hand, self.mask = by_hand, mask
        self.qkv = nn.Linear(8, 24)
        self.classify = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            added = self.mask if self.mask.is_floating_point() else self.mask.float().log()
            out = (q @ k.transpose(2, 3) * 0.7 + added).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, self.mask, scale=0.7)
        return self.classify(out.transpose(1, 2).flatten(2).mean(1))


SLOPE = torch.linspace(-3, 3, 36).view(6, 6)


@pytest.mark.parametrize("mask", [SLOPE, SLOPE > -2.5], ids=["added", "boolean"])
def test_fused_and_plain_attention_are_seen(mask):
    torch.manual_seed(0)
    fused, by_hand = _Attention(False, mask), _Attention(True, mask)
    by_hand.load_state_dict(fused.state_dict())
    x = 3 * torch.randn(2, 6, 8)
    losses = []
    for net in (fused, by_hand):
        loss, _ = DiverseAttention(_cross_entropy, 5.0)(net, x, ANSWERS)
        loss.backward()
        losses.append(loss.detach())
    plain = _cross_entropy(fused, x, ANSWERS)[0]
    assert losses[0] > plain + 0.1
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(fused.qkv.weight.grad, by_hand.qkv.weight.grad)


def test_causal_and_grouped_attention_is_seen():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 6, 4) for heads in (4, 2, 2))
    query.requires_grad_()

    def attention(net: nn.Module, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=0.5, is_causal=True, enable_gqa=True
        )
        return out.sum() * 0, out

    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 2
    weights = scores.masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf).softmax(-1)
    loss, _ = DiverseAttention(attention, 1.0)(nn.Identity(), query, ANSWERS)
    torch.testing.assert_close(loss, attention_similarity(weights))


@pytest.mark.parametrize("family", ["biformer", "efficientvit", "favit", "litv2", "shvit"])
def test_families_are_seen(family):
    model = small(family, num_classes=2)
    loss, logits = DiverseAttention(_cross_entropy, 1.0)(model, images(2, 3, 128, 128), ANSWERS)
    assert loss >= F.cross_entropy(logits, ANSWERS) - 1e-6
    loss.backward()


def test_faults():
    with pytest.raises(RecipeError, match="softmax attention between tokens"):
        DiverseAttention(_cross_entropy, 1.0)(
            small("van", num_classes=2), images(2, 3, 64, 64), ANSWERS
        )
    with pytest.raises(RecipeError, match="attn_diversity"):
        load_recipe(None, {"model": "van_b0", "attn_diversity": -1.0})


@pytest.mark.parametrize("other", ["compile", "grad_checkpointing"])
def test_unsupported_combinations(other):
    given: dict[str, Any] = {"model": "favit_b0", "attn_diversity": 1.0}
    objective = build_objective(load_recipe(None, given), 2, {}, False, torch.device("cpu"))
    assert isinstance(objective, DiverseAttention)
    with pytest.raises(RecipeError, match="not support compile or grad_checkpointing"):
        load_recipe(None, {**given, other: True})
