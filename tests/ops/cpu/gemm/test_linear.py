"""Linear layers, one and two in one pass, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import (
    LINEAR_DTYPES,
    PLAIN_ACTIVATIONS,
    can_run,
    compiled_for,
    emulate_tiles,
    linear_layer,
    random,
    steepness,
    using_threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import cpu
from ops.cpu.activations import ACTIVATIONS
from ops.cpu.gemm.linear import (
    pack_weight,
    packed_linear,
    packed_linear_energy,
)
from ops.cpu.gemm.mlp import packed_mlp
from ops.cpu.gemm.problem import COMBINATIONS

_COMBINED = {
    "none": lambda x, *_: x,
    "add": lambda x, other, _: x + other,
    "multiply": lambda x, other, _: x * other,
    "add_scaled": lambda x, other, scale: x + other * scale,
}


@settings(max_examples=120, deadline=None)
@given(
    dtype=st.sampled_from(list(LINEAR_DTYPES)),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 17)),
    in_features=st.sampled_from([1, 3, 8, 32, 37, 96]),
    out_features=st.sampled_from([1, 7, 16, 17, 32, 40, 100]),
    cut=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    combination=st.sampled_from(COMBINATIONS),
    scale_dtype=st.sampled_from([None, torch.float32, "that of x"]),
)
def test_is_the_linear_layer(
    dtype, batch, size, in_features, out_features, cut, activation, combination, scale_dtype
) -> None:
    x = random(batch, *size, in_features + 5).to(dtype)
    x = x[..., 2 : 2 + in_features] if cut else x[..., :in_features].contiguous()
    weight, bias, packed = linear_layer(in_features, out_features, dtype)
    other = None
    if combination != "none":
        other = random(batch, *size, out_features, seed=3).to(dtype)
    of_scale = dtype if scale_dtype == "that of x" else scale_dtype
    scale = None if of_scale is None else random(batch, in_features, seed=4).to(of_scale)
    other_scale = random(out_features, seed=5).float() if combination == "add_scaled" else None
    gate = random(batch, out_features, seed=6).to(dtype) if combination == "add_gated" else None
    if gate is not None and activation not in ("none", "relu", "relu6"):
        activation = "none"
    scaled = x.double() if scale is None else x.double() * scale[:, None, None]
    if cpu.load("gemm").linear_multiplies_bfloat16():
        scaled = scaled.to(dtype).double()
    if combination == "add_clipped":
        activation = "relu6" if activation == "relu6" else "relu"
    plain = F.linear(scaled, weight, bias)
    activated = PLAIN_ACTIVATIONS[activation](plain)
    if combination == "add_clipped":  # the activation comes last
        expected = PLAIN_ACTIVATIONS[activation](plain + other)
    elif gate is not None:
        expected = PLAIN_ACTIVATIONS[activation](plain * gate[:, None, None] + other)
    else:
        expected = _COMBINED[combination](activated, other, other_scale)
    scales = scale, other_scale
    out = packed_linear(x, *packed, activation, other, combination, *scales, gate=gate)
    # Relative to the sums without cancellation.
    bound = F.linear(scaled.abs(), weight.abs(), bias.abs()).max()
    bound = bound * steepness(activation, bound)
    bound = bound * (1 if other is None else 1 + other.abs().max())
    bound = bound * (1 if other_scale is None else 1 + other_scale.abs().max())
    bound = bound * (1 if gate is None else 1 + gate.abs().max())
    tolerance = LINEAR_DTYPES[dtype] * bound
    assert out.dtype == dtype and out.is_contiguous()
    assert (out - expected).abs().max() < tolerance
    out, energy = packed_linear_energy(x, *packed, activation, scale)
    assert (out - activated).abs().max() < tolerance
    assert (energy - activated.square().sum((1, 2))).abs().max() < 1e-5 * bound**2 * x.shape[1] * 17


@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES))
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [(13, 300, 70), (600, 300, 70), (5000, 300, 70), (50, 1024, 140), (50, 2048, 140)],
)
def test_many_rows_and_few(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    x = random(1, rows, in_features).to(dtype)
    weight, bias, packed = linear_layer(in_features, out_features, dtype)
    expected = F.linear(x.double(), weight, bias)
    error = (packed_linear(x, *packed) - expected).abs().max()
    assert error < 10 * LINEAR_DTYPES[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("instructions", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(instructions: str, dtype: torch.dtype, monkeypatch) -> None:
    """Those that do not multiply bfloat16 round nothing but the result."""
    if not can_run(instructions):
        pytest.skip(f"this CPU has no {instructions}")
    compiled_for(instructions, monkeypatch)
    monkeypatch.setattr("ops.cpu.gemm.linear.multiplies", lambda dtype: dtype == torch.float32)
    for in_features, out_features in ((21, 27), (64, 40), (601, 16)):
        x, scale = random(2, 9, in_features).to(dtype), random(2, in_features, seed=4)
        weight, bias, packed = linear_layer(in_features, out_features, dtype)
        expected = F.gelu(F.linear(x.double() * scale[:, None], weight, bias))
        out, energy = packed_linear_energy(x, *packed, "gelu", scale.float())
        assert out.dtype == dtype and packed[0].dtype == dtype
        rounded = 2**-8 * expected.abs() if dtype == torch.bfloat16 else 0
        assert ((out - expected).abs() - rounded).max() < 2e-6 * expected.abs().max()
        assert (energy - expected.square().sum(1)).abs().max() < 2e-6 * energy.max()
    assert cpu.status("gemm").instruction_set == instructions


@pytest.mark.skipif(not can_run("avx512bf16"), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("has_tiles", [False, True])
def test_instruction_sets_with_bfloat16(has_tiles: bool, monkeypatch, with_tiles) -> None:
    """As on CPUs with AVX512-BF16, without and with AMX; rows of every length, at odd places."""
    if has_tiles:
        emulate_tiles(monkeypatch, with_tiles)
    else:
        compiled_for("avx512bf16", monkeypatch)
    sizes = [(1, 1, 1), (9, 21, 27), (40, 34, 48), (33, 130, 70), (40, 64, 48)]
    for rows, in_features, out_features in sizes:
        x = random(2, rows, in_features + 3).to(torch.bfloat16)[..., 1 : 1 + in_features]
        weight, bias, packed = linear_layer(in_features, out_features, torch.bfloat16)
        expected = F.linear(x.double(), weight, bias).relu()
        out, energy = packed_linear_energy(x, *packed, "relu")
        bound = F.linear(x.double().abs(), weight.abs()).max() + 1
        assert (out - expected).abs().max() < LINEAR_DTYPES[torch.bfloat16] * bound
        assert (energy - expected.square().sum(1)).abs().max() < 1e-2 * energy.max()
    assert cpu.status("gemm").instruction_set == "avx512bf16"
    assert hasattr(cpu.load("gemm"), "has_emulated_tiles") == has_tiles


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


@pytest.mark.parametrize("dtype", list(LINEAR_DTYPES))
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(3, 5), (31, 43)])
@pytest.mark.parametrize("dims", [(24, 70, 24), (64, 1500, 40)])
def test_is_both_layers(dtype, threads, size, dims) -> None:
    """Some rows at a time where there are many, from inputs that lie apart."""
    dim, hidden, out_dim = dims
    x = random(2, *size, dim + 3).to(dtype)[..., :dim]
    residual = random(2, *size, out_dim + 1, seed=3).to(dtype)[..., 1:]
    weight1, bias1, first = linear_layer(dim, hidden, dtype)
    weight2, bias2, second = linear_layer(hidden, out_dim, dtype)
    between = F.gelu(F.linear(x.double(), weight1, bias1)).to(dtype).double()
    expected = F.linear(between, weight2, bias2)
    with using_threads(threads):
        out = packed_mlp(x, *first, *second, "gelu")
        added = packed_mlp(x, *first, *second, "gelu", residual)
    assert out.dtype == dtype and out.is_contiguous() and added.is_contiguous()
    tolerance = 2 * LINEAR_DTYPES[dtype] * expected.abs().max()
    assert (out - expected).abs().max() < tolerance
    assert (added - expected - residual).abs().max() < tolerance
