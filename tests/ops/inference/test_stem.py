"""Stems in one pass against their layers in float64, what is one, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled_kernels import PLAIN_ACTIVATIONS, compiled_for, random, without_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from backbones._fuse import put_channels_last
from ops import native
from ops.depthwise import ACTIVATIONS
from ops.inference.stem import FastStem, is_stem, pack_layers, packed_stem, unsupported
from ops.mobile import conv_stem
from ops.reparam import fuse_children


def _convs(*channels: int, bias: bool = True) -> list[nn.Conv2d]:
    torch.manual_seed(0)
    return [
        nn.Conv2d(before, after, 3, 2, 1, bias=bias)
        for before, after in zip(channels, channels[1:], strict=False)
    ]


def _plain(x: Tensor, convs: list[nn.Conv2d], activations: list[str]) -> Tensor:
    x = x.double()
    for conv, act in zip(convs, activations, strict=True):
        x = PLAIN_ACTIVATIONS[act](copy.deepcopy(conv).double()(x))
    return x


def _agrees(
    x: Tensor, convs: list[nn.Conv2d], activations: list[str], tolerance: float = 1e-5
) -> None:
    with torch.no_grad():
        out = packed_stem(x, *pack_layers(convs, x.dtype), activations)
        expected = _plain(x, convs, activations)
    assert out.shape == expected.shape and out.dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out - expected).abs().max() < tolerance * (1 + expected.abs().max())


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    channels=st.lists(st.sampled_from([1, 3, 4, 16, 20, 33]), min_size=2, max_size=5),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
)
def test_is_the_layers_in_a_row(batch, size, channels, activation, bias) -> None:
    convs = _convs(*channels, bias=bias)
    _agrees(random(batch, channels[0], *size).float(), convs, [activation] * len(convs))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    image_channels=st.sampled_from([1, 3, 4]),
    channels=st.lists(st.sampled_from([2, 10, 16, 34]), min_size=1, max_size=4),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_bfloat16_is_the_layers_in_a_row(batch, size, image_channels, channels, activation) -> None:
    """Only maps between the layers, weights and results are rounded."""
    convs = [conv.bfloat16() for conv in _convs(image_channels, *channels)]
    x = random(batch, image_channels, *size).bfloat16()
    activations = [activation] * len(convs)
    if unsupported(x.device, x.dtype) is None:
        _agrees(x, convs, activations, tolerance=0.02)
    else:
        with pytest.raises(RuntimeError, match="bfloat16"):
            packed_stem(x, *pack_layers(convs, x.dtype), activations)


def test_odd_channels_of_bfloat16_are_left_to_torch() -> None:
    floats = not native.multiplies(torch.bfloat16)  # made of it on the way
    even = floats or native.instruction_set() != "amx"
    for channels, made in (((3, 16, 33), even), ((3, 15, 32), floats)):
        fast = nn.Sequential(*_convs(*channels)).eval().bfloat16()
        expected = copy.deepcopy(fast)
        put_channels_last(fast, always=False)
        x = random(1, 3, 20, 20).bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), expected(x), rtol=0.05, atol=0.02)
            assert (fast.derive(x) is not None) == made
    packed = pack_layers(_convs(3, 15, 32))
    with pytest.raises(ValueError, match="must have even channels, got 15"):
        packed_stem(x, *packed, ["none", "none"])


@pytest.mark.parametrize("instructions", ["avx2", "portable"])
def test_other_instruction_sets(instructions: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("VISION_BACKBONES_CACHE_DIR", str(tmp_path))
    compiled_for(instructions, monkeypatch)
    _agrees(random(2, 3, 37, 50).float(), _convs(3, 20, 40), ["relu", "none"])


def test_sizes_change_from_call_to_call_and_threads_agree() -> None:
    convs = _convs(3, 24, 48, 96)
    for size in ((64, 64), (33, 129), (128, 64)):
        _agrees(random(2, 3, *size).float(), convs, ["relu", "relu", "none"])
    x = random(1, 3, 64, 80).float().contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outs.append(packed_stem(x, *pack_layers(convs), ["relu"] * 3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_what_is_a_stem() -> None:
    act = nn.ReLU()
    assert is_stem(nn.Sequential(nn.Sequential(*_convs(3, 8), act), *_convs(8, 16)))
    assert is_stem(nn.Sequential(*_convs(3, 8), LayerNorm2d(8), act, *_convs(8, 16), act))
    assert not is_stem(nn.Sequential(*_convs(3, 8)))
    assert not is_stem(nn.Sequential(act, *_convs(3, 8, 16)))
    assert not is_stem(nn.Sequential(*_convs(3, 8), act, LayerNorm2d(8), *_convs(8, 16)))
    assert not is_stem(nn.Sequential(*_convs(3, 8), act, act, *_convs(8, 16)))
    assert not is_stem(nn.Sequential(*_convs(3, 8), LayerNorm2d(8, affine=False), *_convs(8, 16)))
    assert not is_stem(nn.Sequential(*_convs(3, 8), nn.Conv2d(8, 16, 3, 1, 1)))
    assert not is_stem(nn.Sequential(*_convs(4, 8), nn.Conv2d(8, 8, 3, 2, 1, groups=2)))
    assert not is_stem(nn.Sequential(nn.Sequential(*_convs(3, 8), nn.Tanh()), *_convs(8, 16)))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    channels=st.tuples(st.sampled_from([1, 3]), *[st.sampled_from([4, 20, 33, 70])] * 2),
    act_layer=st.sampled_from([nn.GELU, nn.ReLU, nn.Identity]),
)
def test_norms_between_the_layers(size, channels, act_layer) -> None:
    """Both forms, with norms that differ and convolutions without one."""
    first, second = _convs(*channels)
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
        put_channels_last(fast, always=False)
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
    put_channels_last(fast, always=False)
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
    put_channels_last(fast, always=False)
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
    with pytest.raises(RuntimeError, match="not available"):
        packed_stem(x.float(), [torch.zeros(16 * 27)], [torch.zeros(16)], ["none"])


def test_refusals() -> None:
    assert unsupported(torch.device("cpu"), torch.float16) is not None
    convs = _convs(3, 8, 16)
    weights, biases = pack_layers(convs)
    x = random(1, 3, 8, 8).float()
    with pytest.raises(ValueError, match="float32"):
        packed_stem(x.double(), weights, biases, ["none", "none"])
    with pytest.raises(ValueError, match="an activation for each"):
        packed_stem(x, weights, biases, ["none"])
    with pytest.raises(ValueError, match="'tanh'"):
        packed_stem(x, weights, biases, ["none", "tanh"])
    with pytest.raises(ValueError, match="7 to 8 channels"):
        packed_stem(random(1, 7, 8, 8).float(), weights, biases, ["none", "none"])
    with pytest.raises(ValueError, match="an eps for each of 2 layers, or none, got 1 and 0"):
        packed_stem(x, weights, biases, ["none", "none"], [torch.zeros(2, 8)])
    with pytest.raises(ValueError, match="must be torch.float32, got torch.bfloat16"):
        packed_stem(x, weights, [b.bfloat16() for b in biases], ["none", "none"])
    norms = [torch.zeros(0), torch.zeros(2, 8)]
    with pytest.raises(ValueError, match=r"must be \(2, 16\), got \(2, 8\)"):
        packed_stem(x, weights, biases, ["none", "none"], norms, [0.0, 1e-6])


def test_the_dispatcher_sees_one_operator() -> None:
    convs = _convs(3, 8, 16)
    packed = (*pack_layers(convs), ["relu", "none"], [torch.ones(2, 8), torch.zeros(0)], [0.1, 0])
    arguments = (random(2, 3, 17, 20).float(), *packed)
    operator = torch.ops.vision_backbones.packed_stem.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(operator(*arguments), packed_stem(*arguments))
