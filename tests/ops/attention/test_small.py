"""Attention whose definition takes a line or two: against it, or against torch and timm."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_same_with_gradients
from compiled_kernels import random
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from zoo import images, randomise, small

import backbones
from ops.attention import biased
from ops.attention.biased import attend_in_turn
from ops.attention.large_kernel import DilatedDepthwiseConv2d
from ops.attention.pooled import pool_tokens
from ops.attention.softmax import softmax_attention
from ops.attention.token_pooling import TokenPooling, token_attentions
from ops.attention.window import shift_masks, window_attention


# ---- pooled keys ---------------------------------------------------------------------------------
@given(tokens=st.integers(1, 20), length=st.integers(1, 20))
def test_pool_drops_the_remainder(tokens: int, length: int) -> None:
    x = torch.randn(2, tokens, 3, dtype=torch.float64)
    run = min(length, tokens)
    expected = [x[:, i : i + run].mean(1) for i in range(0, tokens - run + 1, run)]
    torch.testing.assert_close(pool_tokens(x, length), torch.stack(expected, dim=1))


# ---- large kernels -------------------------------------------------------------------------------
@given(
    size=st.tuples(st.integers(1, 31), st.integers(1, 31)),
    kernel_size=st.sampled_from([3, 5, 7]),
    dilation=st.integers(1, 4),
)
def test_phases_make_the_same_map_and_gradients(size, kernel_size, dilation) -> None:
    layer = DilatedDepthwiseConv2d(3, kernel_size, dilation).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    wanted = F.conv2d(x, layer.weight, layer.bias, 1, layer.padding, dilation, groups=3)
    assert_same_with_gradients(layer(x), wanted, (x, layer.weight, layer.bias))


# ---- window by window ----------------------------------------------------------------------------
def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def test_gradients_and_theirs() -> None:
    inputs = tensors((3, 2, 4, 3), (3, 2, 5, 3), (3, 2, 5, 3), (2, 4, 5))
    mask = torch.tensor([0.0, 1.0, -2.0, 0.0, 3.0], dtype=torch.float64).expand(4, 5)

    def attend(*inputs: Tensor) -> Tensor:
        return attend_in_turn(*inputs, masks=(mask, None, mask))

    q, k, v, bias = inputs
    masks = torch.stack((mask, torch.zeros_like(mask), mask)).unsqueeze(1)
    wanted = (q @ k.transpose(2, 3) / 3**0.5 + bias + masks).softmax(-1) @ v
    torch.testing.assert_close(attend(*inputs), wanted)
    plain, again = (
        torch.autograd.grad(attend(*inputs).square().sum(), inputs, create_graph=twice)
        for twice in (False, True)
    )
    torch.testing.assert_close(plain, again)
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_find_their_masks(
    rows: int, columns: int, shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = (2, rows, columns, 4, 2, 3)
    inputs = tensors(window, window, window, (2, 4, 4))
    masks = shift_masks(2, 1, torch.float64) if shifted else None
    results = []
    for limit in (0, 1 << 40):
        monkeypatch.setattr(biased, "_SCORE_BYTES", limit)
        out = window_attention(*inputs, masks)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results)


# ---- NaN propagates ------------------------------------------------------------------------------
KEYS = pytest.mark.parametrize("keys", (1, 2, 4, 7, 8, 15, 16, 17, 49))


def query_key_value(keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.to(dtype).requires_grad_() for t in tensors(*((2, 3, n, 8) for n in (5, keys, keys)))]


@torch.no_grad()
@KEYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_propagates(which: int, dtype: torch.dtype, keys: int) -> None:
    """Where the formula has it; torch loses it if there are few keys."""
    query, key, value = given = query_key_value(keys, dtype)
    given[which][0, 0, 0, 0] = torch.nan
    weights = (query @ key.transpose(2, 3) / 8**0.5).softmax(3)
    assert torch.equal(softmax_attention(query, key, value).isnan(), (weights @ value).isnan())


@pytest.mark.parametrize("scale", [None, 0.7])
@KEYS
def test_otherwise_as_in_torch(keys: int, scale: float | None) -> None:
    inputs = query_key_value(keys)
    expected = F.scaled_dot_product_attention(*inputs, scale=scale)
    assert_same_with_gradients(softmax_attention(*inputs, scale=scale), expected, inputs)


def test_compiles_with_a_symbolic_number_of_keys() -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return softmax_attention(query, key, value)

    keys = torch.export.Dim("keys", min=1, max=99)
    exported = torch.export.export(
        Attention(), tuple(query_key_value(5)), dynamic_shapes=({}, {2: keys}, {2: keys})
    )
    inputs = query_key_value(40)
    torch.testing.assert_close(exported.module()(*inputs), softmax_attention(*inputs))


# ---- pooling before attention --------------------------------------------------------------------
WITH_ATTENTION = ["biformer", "efficientvit", "favit", "hat", "litv2", "ravlt", "shvit"]


@torch.no_grad()
def test_weights_of_means() -> None:
    torch.manual_seed(0)
    pool = TokenPooling(5, scales=3).eval()
    x = torch.randn(2, 5, 6, 7)
    shares, means = pool.predictor(x).softmax(1), [x]
    for d in (1, 2):
        means.append(F.unfold(x, 3, dilation=d, padding=d).view(2, 5, 9, 6, 7).mean(2))
    expected = sum(shares[:, i : i + 1] * mean for i, mean in enumerate(means))
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
