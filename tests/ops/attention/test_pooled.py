"""Pooled attention against the loops that describe it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.attention.pooled import PooledAttention, pool_tokens


@given(tokens=st.integers(1, 20), length=st.integers(1, 20))
def test_pool_drops_the_remainder(tokens: int, length: int) -> None:
    x = torch.randn(2, tokens, 3, dtype=torch.float64)
    run = min(length, tokens)
    expected = [x[:, i : i + run].mean(1) for i in range(0, tokens - run + 1, run)]
    torch.testing.assert_close(pool_tokens(x, length), torch.stack(expected, dim=1))


def naive(layer: PooledAttention, x: Tensor) -> Tensor:
    """One image, one head, one query at a time."""
    pooled = x
    if layer.sr_ratio > 1:
        pooled = torch.nn.functional.avg_pool1d(x.transpose(1, 2), layer.sr_ratio**2)
        pooled = layer.norm(pooled).transpose(1, 2)
    query, key, value = layer.q(x), layer.k(pooled), layer.v(pooled)
    width = x.shape[2] // layer.num_heads
    images = []
    for b in range(len(x)):
        heads = []
        for h in range(layer.num_heads):
            share = slice(h * width, (h + 1) * width)
            keys, values = key[b, :, share], value[b, :, share]
            rows = [(keys @ q * width**-0.5).softmax(0) @ values for q in query[b, :, share]]
            heads.append(torch.stack(rows))
        images.append(torch.cat(heads, dim=1))
    return layer.proj(torch.stack(images))


def randomised(layer: nn.Module) -> nn.Module:
    """Every branch counts."""
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.normal_(0, 0.5)
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return layer.double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("sr_ratio", "tokens"), [(1, 7), (2, 15)])
def test_layer_is_its_definition_with_its_gradients(
    sr_ratio: int, tokens: int, training: bool
) -> None:
    torch.manual_seed(0)
    layer = randomised(PooledAttention(8, 2, sr_ratio)).train(training)
    x = torch.randn(2, tokens, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.randn_like(x)
    tensors = [x, *layer.parameters()]
    ours, theirs = layer(x), naive(layer, x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad((ours * scale).sum(), tensors),
        torch.autograd.grad((theirs * scale).sum(), tensors),
    )


@pytest.mark.parametrize("sr_ratio", [1, 2])
def test_norms_fold_away(sr_ratio: int) -> None:
    torch.manual_seed(0)
    layer = randomised(PooledAttention(8, 2, sr_ratio)).eval()
    norm = randomised(nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    expected = layer(norm(x).flatten(2).transpose(1, 2))
    key = layer.k
    weight = key.weight.clone()
    layer.fold_norm(norm)
    assert layer.fuse().fuse() is layer
    assert isinstance(layer.norm, nn.Identity)
    torch.testing.assert_close(layer(x.flatten(2).transpose(1, 2)), expected)
    assert torch.equal(key.weight, weight)


def test_errors() -> None:
    with pytest.raises(ValueError, match="got 0"):
        pool_tokens(torch.zeros(1, 4, 2), 0)
    with pytest.raises(ValueError, match="got 3 heads for 8 channels"):
        PooledAttention(8, 3)
