"""Dense 3×3 convolutions by Winograd's filtering, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled_kernels import PLAIN_ACTIVATIONS, using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.winograd.winograd import WinogradConv2d
from ops.inference.layers import FastConv2d, activate, convert


def _conv(
    channels: int, out_channels: int, padding: tuple[int, int] = (1, 1), groups: int = 1
) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out_channels, 3, padding=padding, groups=groups)
    return conv.requires_grad_(False)


def _check(conv: nn.Conv2d, x: Tensor, activation: str = "none") -> Tensor:
    out = WinogradConv2d(conv)(x, activation)
    wide = copy.deepcopy(conv).double()
    exact = PLAIN_ACTIVATIONS[activation](wide(x.double()))
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    limit = 2e-6 * (1 + wide(x.double()).abs().max())
    assert (out - exact).abs().max() <= limit
    return out


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(3, 19), st.integers(3, 21)),
    channels=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    activation=st.sampled_from(["none", "relu", "relu6", "silu", "gelu"]),
    groups=st.integers(1, 7),
    is_nchw=st.booleans(),
)
def test_equals_the_convolution(
    batch, size, channels, padding, activation, groups, is_nchw
) -> None:
    of_all = [count * groups for count in channels]
    x = torch.randn(batch, of_all[0], *size)
    x = x if is_nchw else x.to(memory_format=torch.channels_last)
    _check(_conv(*of_all, padding, groups), x, activation)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("shape", [(8, 64, 28, 27), (1, 96, 57, 40), (2, 320, 7, 7)])
def test_blocks_and_threads(shape: tuple[int, ...], groups: int, threads: int) -> None:
    x, conv = torch.randn(shape), _conv(shape[1], 48, groups=groups)
    with using_threads(threads):
        assert torch.equal(_check(conv, x), _check(conv, x))


def test_a_map_of_one_pixel() -> None:
    _check(_conv(20, 17), torch.randn(2, 20, 1, 1))


def test_convolutions_without_bias() -> None:
    conv = _conv(20, 17)
    conv.bias = None
    _check(conv, torch.randn(2, 20, 5, 4), "relu")


@pytest.mark.parametrize("pays", [True, False])
def test_the_inference_form_asks_the_policy(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "winograd_by_kernel", lambda *_: pays)
    plain = _conv(32, 40)
    layer, x = convert(copy.deepcopy(plain), FastConv2d), torch.randn(2, 32, 9, 10)
    activate(layer, "relu")
    torch.testing.assert_close(layer(x), plain(x).relu(), rtol=1e-5, atol=1e-5)
    assert isinstance(layer.derived(x)[0], WinogradConv2d) == pays
