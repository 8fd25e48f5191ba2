"""The linear kernel in int8 against its reference in plain torch; bad arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import (
    PLAIN_ACTIVATIONS,
    can_run,
    compiled_for,
    emulate_tiles,
    random,
    steepness,
    using_threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import cpu
from ops.cpu.activations import ACTIVATIONS
from ops.cpu.gemm.int8 import (
    int8_unavailable,
    pack_int8_weight,
    quantize_rows,
    quantize_weight,
    reference,
)
from ops.cpu.gemm.linear import packed_linear, packed_linear_energy
from ops.cpu.gemm.mlp import packed_mlp
from ops.cpu.gemm.problem import COMBINATIONS

_CPU = torch.device("cpu")
_HAS_INT8 = int8_unavailable(_CPU, torch.float32) is None
_needs_int8 = pytest.mark.skipif(not _HAS_INT8, reason="this CPU has no int8 instructions")
# Sums are exact; they and the output are rounded.
_ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
_DTYPES = list(_ROUNDED)
_IN_RANGE = torch.tensor((0.02, 120.0))


def _linear(x, weight, weight_scale, bias, in_range=None, activation="none", *other, **scales):
    int8 = {"weight_scale": weight_scale, "in_range": in_range}
    return packed_linear(x, weight, bias, activation, *other, **scales, **int8)


def _energy(x, weight, weight_scale, bias, in_range, activation, scale):
    return packed_linear_energy(x, weight, bias, activation, scale, weight_scale, in_range)


def _mlp(x, weight1, scale1, bias1, weight2, scale2, bias2, *ranges_and_more):
    range1, range2, activation, residual = ranges_and_more
    ends = activation, residual, scale1, scale2, range1, range2
    return packed_mlp(x, weight1, bias1, weight2, bias2, *ends)


class _Layer:
    """A layer for the reference and for the kernel."""

    def __init__(self, in_features: int, out_features: int, seed: int = 1) -> None:
        weight = random(out_features, in_features, seed=seed).float()
        self.quantized = quantize_weight(weight)
        self.bias = random(out_features, seed=seed + 1).float()
        self.packed = (*pack_int8_weight(weight), self.bias)

    def expected(self, x: Tensor, in_range: Tensor | None = None) -> Tensor:
        return reference(x, *self.quantized, self.bias, in_range)

    def bound(self, x: Tensor, in_range: Tensor | None = None) -> Tensor:
        """The sums without cancellation, of each output."""
        quantized, scale, zero = quantize_rows(x, in_range)
        weight, weight_scale = self.quantized
        sums = F.linear(quantized.double() + zero.double(), weight.double().abs())
        return (sums * scale * weight_scale).nan_to_num() + self.bias.abs() + 1


@_needs_int8
@settings(max_examples=120, deadline=None)
@given(
    dtype=st.sampled_from(_DTYPES),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 17)),
    in_features=st.sampled_from([1, 3, 4, 8, 37, 63, 64, 65, 130]),
    out_features=st.sampled_from([1, 7, 16, 17, 32, 40, 100]),
    cut=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    combination=st.sampled_from(COMBINATIONS),
    has_scale=st.booleans(),
    in_range=st.sampled_from([None, _IN_RANGE]),
    magnitude=st.sampled_from([1.0, 1e-6, 1e6]),
)
def test_is_the_reference(
    dtype, batch, size, in_features, out_features, cut, activation, combination, has_scale,
    in_range, magnitude,
) -> None:  # fmt: skip
    x = (magnitude * random(batch, *size, in_features + 5)).to(dtype)
    x = x[..., 2 : 2 + in_features] if cut else x[..., :in_features].contiguous()
    layer = _Layer(in_features, out_features)
    other = None
    if combination != "none":
        other = random(batch, *size, out_features, seed=3).to(dtype)
    scale = random(batch, in_features, seed=4).float() if has_scale else None
    other_scale = random(out_features, seed=5).float() if combination == "add_scaled" else None
    scaled = x.float() if scale is None else x.float() * scale[:, None, None]
    clips_sum = combination in ("add_clipped", "add_gated")  # the activation comes last
    if clips_sum:
        activation = "relu6" if activation == "relu6" else "relu"
    expected = layer.expected(scaled, in_range)
    gate = random(batch, out_features, seed=6).to(dtype) if combination == "add_gated" else None
    expected = expected if gate is None else expected * gate[:, None, None]
    expected = PLAIN_ACTIVATIONS[activation](expected + other if clips_sum else expected)
    if other is not None and not clips_sum:
        times = 1 if other_scale is None else other_scale
        expected = expected * other if combination == "multiply" else expected + other * times
    combined = other, combination, scale, other_scale
    out = _linear(x, *layer.packed, in_range, activation, *combined, gate=gate)
    bound = layer.bound(scaled, in_range)
    bound = bound * steepness(activation, layer.expected(scaled, in_range).abs())
    bound = bound * (1 if other is None else 1 + other.abs().max())
    bound = bound * (1 if other_scale is None else 1 + other_scale.abs().max())
    bound = bound * (1 if gate is None else 1 + gate.abs().max())
    assert out.dtype == dtype and out.is_contiguous()
    assert ((out - expected).abs() <= 2 * _ROUNDED[dtype] * bound).all()


@_needs_int8
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("rows", [13, 600, 5000])
def test_many_rows_and_few(rows: int, dtype: torch.dtype) -> None:
    layer, x = _Layer(300, 70), random(1, rows, 300).to(dtype)
    error = (_linear(x, *layer.packed) - layer.expected(x)).abs()
    assert (error <= _ROUNDED[dtype] * layer.bound(x)).all()


@_needs_int8
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dims", [(24, 70, 24), (64, 1500, 40)])
@pytest.mark.parametrize("ranges", [(None, None), (_IN_RANGE, None), (_IN_RANGE, _IN_RANGE)])
def test_both_layers_in_one_pass(dtype, threads, dims, ranges) -> None:
    """As one after the other, with hidden rows in the dtype of the map."""
    dim, hidden, out_dim = dims
    x = random(2, 31, 43, dim + 3).to(dtype)[..., :dim]
    residual = random(2, 31, 43, out_dim + 1, seed=3).to(dtype)[..., 1:]
    first, second = _Layer(dim, hidden), _Layer(hidden, out_dim, seed=7)
    between = _linear(x, *first.packed, ranges[0], "gelu")
    expected = _linear(between, *second.packed, ranges[1], "none", residual, "add")
    with using_threads(threads):
        out = _mlp(x, *first.packed, *second.packed, *ranges, "gelu", residual)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@_needs_int8
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("in_range", [None, _IN_RANGE], ids=["own", "given"])
def test_sums_of_squares(dtype: torch.dtype, in_range: Tensor | None) -> None:
    """Of each image, of results before they are rounded to the dtype of the map."""
    layer, x = _Layer(70, 40), random(3, 13, 17, 70).to(dtype)
    scale = random(3, 70, seed=4).float()
    for threads in (1, 2):
        with using_threads(threads):
            out, energy = _energy(x, *layer.packed, in_range, "gelu", scale)
        expected = _linear(x, *layer.packed, in_range, "gelu", scale=scale)
        assert torch.equal(out, expected)
        squares = _linear(x.float(), *layer.packed, in_range, "gelu", scale=scale)
        torch.testing.assert_close(energy, squares.square().sum((1, 2)), rtol=1e-5, atol=1e-5)


@_needs_int8
def test_layers_may_be_of_floats_within_the_error_of_int8() -> None:
    x, weight = random(1, 50, 192).float(), random(64, 192, seed=1).float()
    out = _linear(x, *pack_int8_weight(weight), torch.zeros(64))
    exact = F.linear(x, weight)
    assert (out - exact).norm() < 0.015 * exact.norm()


@pytest.mark.parametrize("in_range", [None, _IN_RANGE], ids=["own", "given"])
def test_rounding_of_rows(in_range: Tensor | None) -> None:
    """To the nearest byte, the even one of two, with zero being a byte."""
    x = torch.cat((random(4, 30).float(), torch.zeros(1, 30), torch.full((1, 30), 3.0)))
    quantized, scale, zero = quantize_rows(x, in_range)
    assert quantized.min() >= 0 and quantized.max() <= 255
    assert (zero == zero.round()).all()
    if in_range is None:
        assert ((quantized - zero) * scale - x).abs().max() <= 0.5001 * scale.max()
        assert scale[4] == 0 and quantized[5].eq(255).all()


@_needs_int8
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_rows_of_zeros_constants_and_large_values(dtype: torch.dtype) -> None:
    layer = _Layer(70, 40)
    largest = torch.finfo(dtype).max
    rows = torch.zeros(1, 6, 70, dtype=dtype)
    rows[0, 1], rows[0, 2], rows[0, 3] = 2.5, -1e-3, 1e-42
    rows[0, 4, 0], rows[0, 4, 1] = 1e30, -1e30
    rows[0, 5, :2] = torch.tensor((largest, -largest))
    out = _linear(rows, *layer.packed)
    torch.testing.assert_close(out[0, 0].float(), layer.bias, rtol=2**-8, atol=0)
    error = (out - layer.expected(rows)).abs()[:, :5]
    assert (error <= _ROUNDED[dtype] * layer.bound(rows)[:, :5]).all()
    assert not out.isnan().any()


@_needs_int8
@pytest.mark.parametrize("in_range", [None, _IN_RANGE], ids=["own", "given"])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 63, 64, 69])
def test_rows_with_nan_or_infinity_are_nan(dtype, value, place, in_range) -> None:
    layer, x = _Layer(70, 40), random(1, 20, 70).to(dtype)
    clean = _linear(x, *layer.packed, in_range)
    x[0, 7, place] = value
    out = _linear(x, *layer.packed, in_range)
    others = [row for row in range(20) if row != 7]
    assert out[0, 7].isnan().all() and torch.equal(out[0, others], clean[0, others])


@_needs_int8
@pytest.mark.parametrize("bits", [0x7F81, 0x7FFF, -0x7F, -1], ids=hex)
def test_every_nan_of_bfloat16_gives_nan(bits: int) -> None:
    """Also those with a sign."""
    layer, x = _Layer(70, 40), random(1, 20, 70).bfloat16()
    x.view(torch.int16)[0, 7, 33] = bits
    for in_range in (None, _IN_RANGE):
        out = _linear(x, *layer.packed, in_range)
        assert out[0, 7].isnan().all() and not out[0, 8].isnan().any()


@_needs_int8
@pytest.mark.parametrize("value", [-3.0, 0.0, -0.0, 3.0])
def test_ranges_of_bfloat16_are_those_of_float32(value: float) -> None:
    """Rows with one sign, with zeros of both signs, and with each number of values."""
    for in_features in (1, 31, 32, 33, 63, 65, 100):
        layer, x = _Layer(in_features, 20), random(1, 40, in_features).bfloat16()
        x[0, :20] = x[0, :20].abs() if value >= 0 else -x[0, :20].abs()
        x[0, 10:30, in_features // 2] = value
        out = _linear(x.float(), *layer.packed)
        assert torch.equal(_linear(x, *layer.packed), out.bfloat16())


@_needs_int8
def test_values_outside_of_the_range_are_clipped() -> None:
    packed = (*pack_int8_weight(torch.ones(3, 1)), torch.zeros(3))
    x = torch.tensor((-1e30, -50.0, 50.0, 1e30)).view(1, 4, 1)
    out = _linear(x, *packed, torch.tensor((0.1, 100.0)))
    torch.testing.assert_close(out[0, :, 0], torch.tensor((-10.0, -10.0, 15.5, 15.5)))


@pytest.mark.parametrize("instructions", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(instructions: str, monkeypatch) -> None:
    """They compute the same, or say that they do not multiply int8."""
    if not can_run(instructions):
        pytest.skip(f"this CPU has no {instructions}")
    compiled_for(instructions, monkeypatch)
    reason = int8_unavailable(_CPU, torch.float32)
    if reason is not None:
        assert "int8 is not faster here" in reason and instructions in reason
        with pytest.raises(RuntimeError, match="int8 is not faster here"):
            pack_int8_weight(torch.ones(3, 5))
        return
    assert instructions != "portable"
    _assert_is_reference()
    assert cpu.status("gemm").instruction_set == instructions


@pytest.mark.skipif(not can_run("avx512bf16"), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("has_tiles", [False, True])
def test_instruction_sets_with_bfloat16(has_tiles: bool, monkeypatch, with_tiles) -> None:
    """As on CPUs with AVX512-BF16, without and with AMX."""
    if has_tiles:
        emulate_tiles(monkeypatch, with_tiles)
    else:
        compiled_for("avx512bf16", monkeypatch)
    _assert_is_reference()
    assert hasattr(cpu.load("gemm"), "has_emulated_tiles") == has_tiles


def _assert_is_reference() -> None:
    sizes = [(1, 1, 1), (9, 21, 27), (40, 34, 48), (33, 130, 70), (40, 64, 48)]
    for rows, in_features, out_features in sizes:
        for dtype in _DTYPES:
            x = random(2, rows, in_features + 3).to(dtype)[..., 1 : 1 + in_features]
            layer = _Layer(in_features, out_features)
            for in_range in (None, _IN_RANGE):
                out = _linear(x, *layer.packed, in_range, "relu")
                error = (out - layer.expected(x, in_range).relu()).abs()
                assert (error <= _ROUNDED[dtype] * layer.bound(x, in_range)).all()


def test_weights_with_nan_give_nan() -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = float("inf")
    quantized, scale = quantize_weight(weight)
    assert quantized[0].eq(127).all() and scale[1].isnan() and not scale[0].isnan()
