"""Token-aware average pooling: its formula, and networks that support it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from zoo import images, randomise, small

import backbones
from ops.attention.token_pooling import TokenPooling, token_attentions

WITH_ATTENTION = ["biformer", "efficientvit", "favit", "hat", "litv2", "ravlt", "shvit"]


@torch.no_grad()
def test_weights_of_means() -> None:
    torch.manual_seed(0)
    pool = TokenPooling(5, scales=3).eval()
    x = torch.randn(2, 5, 6, 7)
    shares = pool.predictor(x).softmax(1)
    padded = F.pad(x, (2, 2, 2, 2))
    expected = shares[:, :1] * x
    for d in (1, 2):
        for dy in (-d, 0, d):
            for dx in (-d, 0, d):
                moved = padded[:, :, 2 + dy : 8 + dy, 2 + dx : 9 + dx]
                expected = expected + shares[:, d : d + 1] * moved / 9
    torch.testing.assert_close(pool(x), expected)
    last = TokenPooling(5, scales=3, channels_last=True).eval()
    last.load_state_dict(pool.state_dict())
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), expected.permute(0, 2, 3, 1))
    assert torch.equal(TokenPooling(5, scales=1).eval()(x), x)
    with pytest.raises(ValueError, match="scales must be 1 or more, got 0"):
        TokenPooling(5, 0)


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_networks_take_it(family: str) -> None:
    """It is before every attention, gets gradients, and stays through fuse(), copies and files."""
    model = randomise(small(family, token_pooling=3)).eval()
    x = images(1, 3, 64, 64)
    model(x).square().mean().backward()
    pools = [attention.token_pooling for attention in token_attentions(model)]
    assert pools
    for pool in pools:
        assert pool.scales == 3
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in pool.parameters())
    with torch.no_grad():
        expected = model(x)
        for pool in pools:
            pool.scales = 1  # the token alone, but with a smaller share
        assert not torch.allclose(model(x), expected, rtol=1e-3)
        for pool in pools:
            pool.scales = 3
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), expected)
        again = small(family, token_pooling=3).eval()
        assert not backbones.load_checkpoint(again, model.state_dict()).reinitialised
        assert torch.equal(again(x), expected)
        fused = backbones.fuse(model)
        for _ in range(3):
            difference = (fused(x) - expected).abs().max()
            assert difference <= 1e-4 * expected.abs().max()


def test_published_weights_leave_it_as_it_is() -> None:
    weights = small("favit").state_dict()
    model = small("favit", token_pooling=4)
    report = backbones.load_checkpoint(model, weights)
    new = [name for name in model.state_dict() if ".token_pooling." in name]
    assert sorted(report.reinitialised) == sorted(new)


def test_networks_without_attention_refuse_it() -> None:
    with pytest.raises(ValueError, match="VAN has no attention that supports token_pooling"):
        small("van", token_pooling=4)
    with pytest.raises(ValueError, match="token_pooling must be in 0 … 64, got -1"):
        small("favit", token_pooling=-1)
