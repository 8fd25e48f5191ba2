"""Linear layers, one and two in one pass: floats against float64, int8 against plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import (
    LINEAR_DTYPES,
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
from ops.cpu.gemm.linear import pack_weight, packed_linear, packed_linear_energy
from ops.cpu.gemm.mlp import packed_mlp
from ops.cpu.gemm.problem import COMBINATIONS

_CPU = torch.device("cpu")
_HAS_INT8 = int8_unavailable(_CPU, torch.float32) is None
_needs_int8 = pytest.mark.skipif(not _HAS_INT8, reason="this CPU has no int8 instructions")
# Sums of int8 are exact; they and the output are rounded.
_ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
_IN_RANGE = torch.tensor((0.02, 120.0))


class Floats:
    """A layer in float64, and packed for the kernel."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, seed: int = 1
    ) -> None:
        weight = random(out_features, in_features, seed=seed).to(dtype)
        bias = random(out_features, seed=seed + 1).float()
        self.weight, self.bias = weight.double(), bias.double()
        self.packed: dict[str, Any] = {"weight": pack_weight(weight), "bias": bias}

    def _given(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Where bfloat16 is multiplied, what was scaled is rounded before."""
        return x.to(dtype).double() if cpu.load("gemm").linear_multiplies_bfloat16() else x.double()

    def expected(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` is a map in ``dtype`` that may have been scaled."""
        return F.linear(self._given(x, dtype), self.weight, self.bias)

    def bound(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Of errors: those of the largest sum without cancellation."""
        sums = F.linear(self._given(x, dtype).abs(), self.weight.abs(), self.bias.abs())
        return LINEAR_DTYPES[dtype] * sums.max()


class Int8:
    """A layer in int8, for its reference and for the kernel; rows have ranges of their own."""

    in_range: Tensor | None = None

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, seed: int = 1
    ) -> None:
        weight = random(out_features, in_features, seed=seed).float()
        self.quantized = quantize_weight(weight)
        self.bias = random(out_features, seed=seed + 1).float()
        packed, scale = pack_int8_weight(weight)
        self.packed = {"weight": packed, "weight_scale": scale, "bias": self.bias}
        self.packed["in_range"] = self.in_range

    def expected(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return reference(x.float(), *self.quantized, self.bias, self.in_range)

    def bound(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Of errors: those of the sums without cancellation, of each output."""
        quantized, scale, zero = quantize_rows(x.float(), self.in_range)
        weight, weight_scale = self.quantized
        sums = F.linear(quantized.double() + zero.double(), weight.double().abs())
        sums = (sums * scale * weight_scale).nan_to_num() + self.bias.abs() + 1
        return _ROUNDED[dtype] * sums


class Int8InRange(Int8):
    """With the range of a calibration."""

    in_range = _IN_RANGE


IN_INT8 = [pytest.param(kind, marks=_needs_int8) for kind in (Int8, Int8InRange)]
DTYPE = pytest.mark.parametrize("dtype", list(_ROUNDED), ids=str)
CASES = pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((Floats, dtype) for dtype in LINEAR_DTYPES),
        *(
            pytest.param(kind, dtype, marks=_needs_int8)
            for kind in (Int8, Int8InRange)
            for dtype in _ROUNDED
        ),
    ],
)


def _numbered(number: int, packed: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}{number}": tensor for name, tensor in packed.items()}


@pytest.mark.parametrize("kind", [Floats, *IN_INT8])
@settings(max_examples=80)
@given(data=st.data())
def test_is_the_layer(kind: Any, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(LINEAR_DTYPES if kind is Floats else _ROUNDED)))
    batch, rows, columns = (data.draw(st.integers(1, most)) for most in (3, 9, 17))
    in_features = data.draw(st.sampled_from([1, 3, 4, 8, 32, 37, 63, 64, 65, 96, 130]))
    out_features = data.draw(st.sampled_from([1, 7, 16, 17, 32, 40, 100]))
    magnitude = 1.0 if kind is Floats else data.draw(st.sampled_from([1.0, 1e-6, 1e6]))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    combination = data.draw(st.sampled_from(COMBINATIONS))
    of_scale = data.draw(st.sampled_from([None, torch.float32, dtype]))
    x = (magnitude * random(batch, rows, columns, in_features + 5)).to(dtype)
    cut = data.draw(st.booleans())
    x = x[..., 2 : 2 + in_features] if cut else x[..., :in_features].contiguous()
    layer, other = kind(in_features, out_features, dtype), None
    if combination != "none":
        other = random(batch, rows, columns, out_features, seed=3).to(dtype)
    scale = None if of_scale is None else random(batch, in_features, seed=4).to(of_scale)
    other_scale = random(out_features, seed=5).float() if combination == "add_scaled" else None
    gate = random(batch, out_features, seed=6).to(dtype) if combination == "add_gated" else None
    wide = x.double() if kind is Floats else x.float()
    scaled = wide if scale is None else wide * scale[:, None, None]
    clips_sum = combination in ("add_clipped", "add_gated")  # the activation comes last
    if clips_sum:
        least = "none" if combination == "add_gated" else "relu"
        activation = activation if activation in ("relu", "relu6") else least
    plain = layer.expected(scaled, dtype)
    gated = plain if gate is None else plain * gate[:, None, None]
    expected = PLAIN_ACTIVATIONS[activation](gated + other if clips_sum else plain)
    bound = layer.bound(scaled, dtype) * (1 if kind is Floats else 2)
    bound = bound * steepness(activation, plain.abs())
    bound = bound * (1 if gate is None else 1 + gate.abs().max())
    if other is not None:
        times = torch.ones(1) if other_scale is None else other_scale
        bound = bound * (1 + other.abs().max()) * (1 + times.abs().max())
        if not clips_sum:
            expected = expected * other if combination == "multiply" else expected + other * times
    combined = {"other": other, "combination": combination, "other_scale": other_scale}
    combined |= {"gate": gate, "scale": scale}
    out = packed_linear(x, activation=activation, **layer.packed, **combined)
    assert out.dtype == dtype and out.is_contiguous()
    assert ((out - expected).abs() <= bound).all()


@CASES
def test_sums_of_squares(kind: Any, dtype: torch.dtype) -> None:
    """Of each image, of results before they are rounded to the dtype of the map."""
    layer, x = kind(70, 40, dtype), random(3, 13, 17, 70).to(dtype)
    scale = random(3, 70, seed=4).float()
    wide = x.double() if kind is Floats else x.float()
    exact = F.gelu(layer.expected(wide * scale[:, None, None], dtype)).square().sum((1, 2))
    for threads in (1, 2):
        with using_threads(threads):
            out, energy = packed_linear_energy(x, activation="gelu", scale=scale, **layer.packed)
        assert torch.equal(out, packed_linear(x, activation="gelu", scale=scale, **layer.packed))
        torch.testing.assert_close(energy.double(), exact, rtol=1e-5, atol=1e-5)
    torch.use_deterministic_algorithms(True)  # with which new memory holds NaN
    try:
        assert not packed_linear_energy(x[:, :0], **layer.packed)[1].any()
    finally:
        torch.use_deterministic_algorithms(False)


@CASES
@pytest.mark.parametrize(
    "size", [(13, 300, 70), (600, 300, 70), (5000, 64, 70), (50, 1024, 140), (50, 2048, 140)]
)
def test_many_rows_and_few(size: tuple[int, int, int], dtype: torch.dtype, kind: Any) -> None:
    rows, in_features, out_features = size
    layer, x = kind(in_features, out_features, dtype), random(1, rows, in_features).to(dtype)
    other = random(1, rows, out_features, seed=3).to(dtype)
    out = packed_linear(x, other=other, combination="add", **layer.packed)
    error = (out - other - layer.expected(x, dtype)).abs()
    assert (error <= layer.bound(x, dtype) * (1 + other.abs().max())).all()


@CASES
@pytest.mark.parametrize("size", [(3, 5), (31, 43)])
@pytest.mark.parametrize("dims", [(24, 70, 24), (64, 1500, 40)])
def test_both_layers_in_one_pass(dtype, size, dims, kind) -> None:
    """As one after the other, from inputs that lie apart; some rows at a time where many are."""
    dim, hidden, out_dim = dims
    x = random(2, *size, dim + 3).to(dtype)[..., :dim]
    residual = random(2, *size, out_dim + 1, seed=3).to(dtype)[..., 1:]
    first, second = kind(dim, hidden, dtype), kind(hidden, out_dim, dtype, seed=7)
    packed = {**_numbered(1, first.packed), **_numbered(2, second.packed)}
    between = packed_linear(x, activation="gelu", **first.packed)
    expected = packed_linear(between, other=residual, combination="add", **second.packed)
    tolerance = 0.0
    if kind is Floats:
        between = F.gelu(first.expected(x, dtype)).to(dtype)
        expected = second.expected(between, dtype)
        tolerance = 2 * LINEAR_DTYPES[dtype] * expected.abs().max()
        out = packed_mlp(x, activation="gelu", **packed)
        assert out.dtype == dtype and (out - expected).abs().max() <= tolerance
        expected = expected + residual
    for threads in (1, 2):
        with using_threads(threads):
            out = packed_mlp(x, activation="gelu", residual=residual, **packed)
        assert out.dtype == dtype and out.is_contiguous()
        assert (out - expected).abs().max() <= tolerance


# ---- instruction sets ----------------------------------------------------------------------------
def _kinds_here() -> Iterator[Any]:
    """Of the instruction set that is set."""
    yield Floats
    if int8_unavailable(_CPU, torch.float32) is None:
        yield from (Int8, Int8InRange)


def _check_sizes(dtype: torch.dtype) -> None:
    """Rows of every length, at odd places."""
    for kind in _kinds_here():
        sizes = [(1, 1, 1), (9, 21, 27), (40, 34, 48), (33, 130, 70), (40, 64, 48), (9, 601, 16)]
        for rows, in_features, out_features in sizes:
            x = random(2, rows, in_features + 3).to(dtype)[..., 1 : 1 + in_features]
            layer = kind(in_features, out_features, dtype)
            expected = layer.expected(x, dtype).relu()
            out, energy = packed_linear_energy(x, activation="relu", **layer.packed)
            assert out.dtype == dtype
            assert ((out - expected).abs() <= layer.bound(x, dtype)).all()
            squares = expected.square().sum(1)
            assert (energy - squares).abs().max() <= 2e-6 * energy.max() + 1e-30


@DTYPE
@pytest.mark.parametrize("instructions", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(
    instructions: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that do not multiply bfloat16 round nothing but the result; some have no int8."""
    if not can_run(instructions):
        pytest.skip(f"this CPU has no {instructions}")
    compiled_for(instructions, monkeypatch)
    monkeypatch.setattr("ops.cpu.gemm.linear.multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setitem(LINEAR_DTYPES, torch.bfloat16, 2**-8)
    reason = int8_unavailable(_CPU, torch.float32)
    if reason is not None:
        assert "int8 is not faster here" in reason and instructions in reason
        with pytest.raises(RuntimeError, match="int8 is not faster here"):
            pack_int8_weight(torch.ones(3, 5))
    assert reason is not None or instructions != "portable"
    _check_sizes(dtype)
    assert cpu.status("gemm").instruction_set == instructions


@pytest.mark.skipif(not can_run("avx512bf16"), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("has_tiles", [False, True])
def test_instruction_sets_with_bfloat16(has_tiles: bool, monkeypatch, with_tiles) -> None:
    """As on CPUs with AVX512-BF16, without and with AMX."""
    if has_tiles:
        emulate_tiles(monkeypatch, with_tiles)
    else:
        compiled_for("avx512bf16", monkeypatch)
    for dtype in _ROUNDED:
        _check_sizes(dtype)
    assert cpu.status("gemm").instruction_set == "avx512bf16"
    assert hasattr(cpu.load("gemm"), "has_emulated_tiles") == has_tiles


# ---- numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_values(activation: str) -> None:
    x = torch.cat((torch.linspace(-9, 9, 20001), torch.tensor([-1e30, -1e4, 1e4, 1e30])))
    identity = pack_weight(torch.ones(1, 1)), torch.zeros(1)
    out = packed_linear(x.view(1, -1, 1), *identity, activation).flatten()
    expected = PLAIN_ACTIVATIONS[activation](x.double())
    expected = expected.clamp(max=torch.finfo(torch.float32).max)  # squares overflow
    out = out.clamp(max=torch.finfo(torch.float32).max)
    assert ((out - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-6


def test_nan_and_infinity_pass() -> None:
    x = torch.zeros(1, 5, 16)
    x[0, 1, 3], x[0, 2, 3] = float("nan"), float("inf")
    packed = pack_weight(torch.ones(20, 16)), torch.zeros(20)
    for activation in ("relu", "gelu", "silu", "relu6"):
        out = packed_linear(x, *packed, activation)
        assert out[0, 1].isnan().all() and out[0, 3:].eq(0).all()
    assert packed_linear(x, *packed)[0, 2].isinf().all()
    assert packed_linear(x, *packed, "relu6")[0, 2].eq(6).all()


# ---- numbers in int8 -----------------------------------------------------------------------------
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
@DTYPE
def test_rows_of_zeros_constants_and_large_values(dtype: torch.dtype) -> None:
    layer, largest = Int8(70, 40, dtype), torch.finfo(dtype).max
    rows = torch.zeros(1, 6, 70, dtype=dtype)
    rows[0, 1], rows[0, 2], rows[0, 3] = 2.5, -1e-3, 1e-42
    rows[0, 4, :2], rows[0, 5, :2] = torch.tensor(((1e30, -1e30), (largest, -largest)))
    out = packed_linear(rows, **layer.packed)
    torch.testing.assert_close(out[0, 0].float(), layer.bias, rtol=2**-8, atol=0)
    error = (out - layer.expected(rows, dtype)).abs()[:, :5]
    assert (error <= layer.bound(rows, dtype)[:, :5]).all()
    assert not out.isnan().any()


@pytest.mark.parametrize("kind", IN_INT8)
@DTYPE
@pytest.mark.parametrize("place", [0, 63, 64, 69])
def test_rows_with_nan_or_infinity_are_nan(place: int, dtype: torch.dtype, kind: Any) -> None:
    layer, x = kind(70, 40, dtype), random(1, 20, 70).to(dtype)
    clean = packed_linear(x, **layer.packed)
    others = [row for row in range(20) if row != 7]
    nans = torch.tensor([0x7F81, 0x7FFF, -0x7F, -1], dtype=torch.int16).view(torch.bfloat16)
    for value in (float("nan"), float("inf"), -float("inf"), *nans):  # some with a sign
        x[0, 7, place] = value
        out = packed_linear(x, **layer.packed)
        assert out[0, 7].isnan().all() and torch.equal(out[0, others], clean[0, others])


@_needs_int8
@pytest.mark.parametrize("value", [-3.0, 0.0, -0.0, 3.0])
def test_ranges_of_bfloat16_are_those_of_float32(value: float) -> None:
    """Rows with one sign, with zeros of both signs, and with each number of values."""
    for in_features in (1, 31, 32, 33, 63, 65, 100):
        layer, x = Int8(in_features, 20, torch.bfloat16), random(1, 40, in_features).bfloat16()
        x[0, :20] = x[0, :20].abs() if value >= 0 else -x[0, :20].abs()
        x[0, 10:30, in_features // 2] = value
        out = packed_linear(x.float(), **layer.packed)
        assert torch.equal(packed_linear(x, **layer.packed), out.bfloat16())


def test_weights_with_nan_give_nan() -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = float("inf")
    quantized, scale = quantize_weight(weight)
    assert quantized[0].eq(127).all() and scale[1].isnan() and not scale[0].isnan()
