"""Detection of stems, and their inference form."""

from __future__ import annotations

import copy

import torch
from compiled_kernels import conv_row, random, without_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import LayerNorm2d
from torch import nn

from ops import cpu
from ops.cpu import policy
from ops.inference.conversion import to_channels_last
from ops.inference.stem import FastStem, is_stem
from ops.mobile import conv_stem
from ops.reparam import fuse_children


def test_odd_channels_of_bfloat16_are_left_to_torch() -> None:
    floats = not policy.multiplies(torch.bfloat16)  # made of it on the way
    even = floats or cpu.instruction_set() != "amx"
    for channels, made in (((3, 16, 33), even), ((3, 15, 32), floats)):
        fast = nn.Sequential(*conv_row(*channels)).eval().bfloat16()
        expected = copy.deepcopy(fast)
        to_channels_last(fast, always=False)
        x = random(1, 3, 20, 20).bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), expected(x), rtol=0.05, atol=0.02)
            assert (fast.derive(x) is not None) == made


def test_what_is_a_stem() -> None:
    act = nn.ReLU()
    assert is_stem(nn.Sequential(nn.Sequential(*conv_row(3, 8), act), *conv_row(8, 16)))
    assert is_stem(nn.Sequential(*conv_row(3, 8), LayerNorm2d(8), act, *conv_row(8, 16), act))
    assert not is_stem(nn.Sequential(*conv_row(3, 8)))
    assert not is_stem(nn.Sequential(act, *conv_row(3, 8, 16)))
    assert not is_stem(nn.Sequential(*conv_row(3, 8), act, LayerNorm2d(8), *conv_row(8, 16)))
    assert not is_stem(nn.Sequential(*conv_row(3, 8), act, act, *conv_row(8, 16)))
    assert not is_stem(
        nn.Sequential(*conv_row(3, 8), LayerNorm2d(8, affine=False), *conv_row(8, 16))
    )
    assert not is_stem(nn.Sequential(*conv_row(3, 8), nn.Conv2d(8, 16, 3, 1, 1)))
    assert not is_stem(nn.Sequential(*conv_row(4, 8), nn.Conv2d(8, 8, 3, 2, 1, groups=2)))
    assert not is_stem(nn.Sequential(nn.Sequential(*conv_row(3, 8), nn.Tanh()), *conv_row(8, 16)))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    channels=st.tuples(st.sampled_from([1, 3]), *[st.sampled_from([4, 20, 33, 70])] * 2),
    act_layer=st.sampled_from([nn.GELU, nn.ReLU, nn.Identity]),
)
def test_norms_between_the_layers(size, channels, act_layer) -> None:
    """Both forms, with norms that differ and convolutions without one."""
    first, second = conv_row(*channels)
    norms = [LayerNorm2d(n, eps=eps) for n, eps in zip(channels[1:], (1e-6, 1e-2), strict=True)]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = random(2, channels[0], *size).float()
    for layers in (
        (first, norms[0], act_layer(), second, norms[1]),
        (first, act_layer(), second, norms[1], act_layer()),
    ):
        plain = nn.Sequential(*layers).eval()
        fast = copy.deepcopy(plain)
        to_channels_last(fast, always=False)
        assert type(fast) is FastStem and list(fast.state_dict()) == list(plain.state_dict())
        expected = plain.double()(x.double())
        assert (fast(x) - expected).abs().max() < 1e-4 * (1 + expected.abs().max())
        plain.float()


def _fused(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A stem as it was, and its fast form."""
    torch.manual_seed(0)
    plain = conv_stem(3, 64).eval().to(dtype)
    fuse_children(plain)
    fast = copy.deepcopy(plain)
    to_channels_last(fast, always=False)
    return plain.requires_grad_(False), fast


def test_the_fast_form_follows_its_parameters_and_keeps_their_names() -> None:
    plain, fast = _fused()
    assert type(fast) is FastStem and list(fast.state_dict()) == list(plain.state_dict())
    x = random(2, 3, 61, 64).float()
    for _ in range(2):
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
                p.mul_(1.5)
                q.mul_(1.5)
    to_channels_last(fast, always=False)
    assert type(fast) is FastStem
    torch.testing.assert_close(copy.deepcopy(fast)(x), plain(x), rtol=1e-4, atol=1e-5)


def test_the_fast_form_in_bfloat16() -> None:
    plain, fast = _fused(torch.bfloat16)
    x = random(1, 3, 32, 32).bfloat16()
    torch.testing.assert_close(fast(x), plain(x), rtol=0.05, atol=0.01)


def test_without_the_kernel_the_layers_run(monkeypatch) -> None:
    x = random(1, 3, 32, 32)
    without_kernels(monkeypatch)
    plain, fast = _fused()
    torch.testing.assert_close(fast(x.float()), plain(x.float()), rtol=1e-4, atol=1e-5)
