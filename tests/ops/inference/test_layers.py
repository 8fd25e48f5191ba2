"""Layers with packed weights: repeated calls of different kinds; which layers are converted."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import PLAIN_ACTIVATIONS, using_threads, without_kernels
from torch import Tensor, nn

from ops.cpu import policy
from ops.cpu.activations import ACTIVATIONS
from ops.cpu.gemm.linear import packed_linear
from ops.cpu.instruction_sets import instruction_set
from ops.inference import conversion
from ops.inference.conv import FastDepthwiseConv2d
from ops.inference.layers import FastConv2d, FastLinear, convert
from ops.replay.capture import Capture
from ops.replay.replay import Replay


def _linear(bias: bool = True) -> FastLinear:
    torch.manual_seed(0)
    return convert(nn.Linear(24, 40, bias=bias).requires_grad_(False), FastLinear)


def _check(layer: FastLinear, x: Tensor, residual: Tensor | None = None) -> None:
    expected = F.linear(x, layer.weight, layer.bias)
    expected = expected.relu() if layer.activation == "relu" else expected
    expected = expected if residual is None else expected + residual
    torch.testing.assert_close(layer(x, residual), expected, rtol=1e-5, atol=1e-5)


def _compute_by(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is our kernel."""
    if what == "oneDNN":
        monkeypatch.setattr(packed_linear, "unavailable", lambda *_, **__: "no")
    elif what == "oneDNN for many rows":
        monkeypatch.setitem(policy._FEW_ROWS, instruction_set(), 8)
        monkeypatch.setattr(policy, "_NARROW", 8)


BY = pytest.mark.parametrize("by", ["our kernel", "oneDNN for many rows", "oneDNN"])


@pytest.mark.parametrize("bias", [True, False])
@BY
def test_alternating_calls(bias: bool, by: str, monkeypatch) -> None:
    _compute_by(by, monkeypatch)
    layer = _linear(bias)
    for _ in range(2):
        for shape in ((3, 24), (2, 5, 24), (1, 3000, 24), (0, 24), (24,)):
            x, residual = torch.randn(shape), torch.randn(*shape[:-1], 40)
            _check(layer, x)
            _check(layer, x, residual)
        _check(layer, torch.randn(2, 24, 5).transpose(1, 2))  # other strides
        x, wide = torch.randn(2, 5, 24), torch.randn(2, 5, 83)
        for residual in (wide[..., :80:2], wide[..., 3:43], wide[:1, :1, :40].expand(2, 5, 40)):
            _check(layer, x, residual)
        _check(layer, x, torch.randn(2, 40, 5).transpose(1, 2))
        with using_threads(2):
            _check(layer, torch.randn(2, 5, 24))
    layer.activation = "relu"
    _check(layer, torch.randn(3, 24))
    _check(layer, torch.randn(3, 24), torch.randn(3, 40))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@BY
@torch.no_grad()
def test_activations_and_factors(by: str, activation: str, monkeypatch) -> None:
    """Each is right, and can be captured."""
    _compute_by(by, monkeypatch)
    layer, x, factor = _linear(), torch.randn(2, 5, 24), torch.randn(2, 5, 40)
    expected = PLAIN_ACTIVATIONS[activation](F.linear(x, layer.weight, layer.bias))
    layer.activation = activation
    layer(x)  # packs the weight
    with Capture(x) as capture:
        out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Replay(capture.finish(out))(x), out)
    out = layer(x, factor=factor)
    torch.testing.assert_close(out, expected * factor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_scales_of_inputs_and_residuals(compiled: bool, dtype: torch.dtype, monkeypatch) -> None:
    if not compiled:
        without_kernels(monkeypatch)
    torch.manual_seed(0)
    layer = convert(nn.Linear(40, 48).requires_grad_(False).to(dtype), FastLinear)
    residual_scale = torch.randn(48)
    for size in ((1, 5, 7), (2, 40, 41), (0, 3, 3)):  # few rows, many and none
        x, residual = (torch.randn(size[0], *size[1:], dim).to(dtype) for dim in (40, 48))
        scale = torch.rand(size[0], 40).to(dtype)
        for by in (None, scale):
            scaled = x.float() if by is None else x.float() * by.float()[:, None, None]
            expected = F.linear(scaled, layer.weight.float(), layer.bias.float())
            added = residual.float() * residual_scale
            for given in (x, x.clone().requires_grad_()):  # with a gradient, in layers of torch
                out = layer(given, residual, by, residual_scale)
                assert out.requires_grad == given.requires_grad
                tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
                bounds = {"rtol": tolerance, "atol": tolerance}
                torch.testing.assert_close(out.float(), expected + added, **bounds)
                torch.testing.assert_close(layer(given, scale=by).float(), expected, **bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_alternating_depthwise_convolutions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 32, 3, padding=1, groups=32).to(dtype)
    layer = convert(copy.deepcopy(plain), FastDepthwiseConv2d)
    for _ in range(2):
        for size in ((9, 7), (4, 4), (1, 1)):
            x = torch.randn(2, 32, *size, dtype=dtype)
            for image in (x, x.to(memory_format=torch.channels_last), x[:0], x[:, :, :1]):
                torch.testing.assert_close(layer(image), plain(image), rtol=0.02, atol=1e-5)
        if layer.activation == "none":
            layer.activation = "relu"
            plain = nn.Sequential(plain, nn.ReLU())


@torch.no_grad()
def test_memory_does_not_grow_with_the_sizes_of_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layout of the weight by oneDNN serves all sizes, and all batch sizes that agree on it."""
    without_kernels(monkeypatch)
    layer = convert(nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False), FastConv2d)

    def kept() -> int:
        return sum(type(t) is Tensor and t.is_mkldnn for t in gc.get_objects())

    before = kept()
    for side in range(3, 43):
        layer(torch.randn(1, 8, side, side + 1))
    assert kept() == before + 1
    for batch in range(1, 9):
        x = torch.randn(batch, 8, 9, 7)
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert kept() <= before + 2


def test_transforms_go_through_torch() -> None:
    layer, x = _linear(), torch.randn(6, 3, 24)
    plain = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(torch.vmap(layer)(x), plain, rtol=1e-5, atol=1e-5)


# ---- conversion ----------------------------------------------------------------------------------
def test_a_dtype_without_instructions_is_named_once(monkeypatch, warned) -> None:
    conversion._warn_not_faster.cache_clear()
    for multiplied, warnings in ((True, 0), (False, 1)):
        monkeypatch.setattr(policy, "multiplies", lambda dtype, yes=multiplied: yes)
        for _ in range(2):
            model = nn.Sequential(nn.Linear(4, 4)).eval().bfloat16()
            assert conversion.to_channels_last(model, always=False)
        assert len(warned()) == warnings
    assert "no instructions for bfloat16" in warned()[0]
