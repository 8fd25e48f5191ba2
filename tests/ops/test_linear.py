"""The kernel of linear layers against float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops import native
from ops.depthwise import ACTIVATIONS
from ops.linear import (
    COMBINATIONS,
    pack_weight,
    packed_linear,
    packed_linear_energy,
    unsupported,
)
from ops.native import build

_PLAIN = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
_COMBINED = {"none": lambda x, _: x, "add": torch.add, "multiply": torch.mul}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _layer(in_features: int, out_features: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Weight and bias in float64, and as the kernel wants them."""
    weight, bias = _random(out_features, in_features, seed=1), _random(out_features, seed=2)
    return weight, bias, (pack_weight(weight.float()), bias.float())


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 17)),
    in_features=st.sampled_from([1, 3, 8, 37, 96]),
    out_features=st.sampled_from([1, 7, 16, 17, 32, 40, 100]),
    cut=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    combination=st.sampled_from(COMBINATIONS),
    has_scale=st.booleans(),
)
def test_is_the_linear_layer(
    batch, size, in_features, out_features, cut, activation, combination, has_scale
) -> None:
    x = _random(batch, *size, in_features + 5)
    x = x[..., 2 : 2 + in_features] if cut else x[..., :in_features].contiguous()
    weight, bias, packed = _layer(in_features, out_features)
    other = _random(batch, *size, out_features, seed=3) if combination != "none" else None
    scale = _random(batch, in_features, seed=4) if has_scale else None
    scaled = x if scale is None else x * scale[:, None, None]
    activated = _PLAIN[activation](F.linear(scaled, weight, bias))
    expected = _COMBINED[combination](activated, other)
    single = [None if t is None else t.float() for t in (other, scale)]
    out = packed_linear(x.float(), *packed, activation, single[0], combination, single[1])
    # Relative to the sums without cancellation.
    bound = F.linear(scaled.abs(), weight.abs()).max() + 1
    bound = bound * (1 if other is None else 1 + other.abs().max())
    assert out.is_contiguous() and (out - expected).abs().max() < 1e-6 * bound
    out, energy = packed_linear_energy(x.float(), *packed, activation, single[1])
    assert (out - activated).abs().max() < 1e-6 * bound
    assert (energy - activated.square().sum((1, 2))).abs().max() < 1e-5 * bound**2 * x.shape[1] * 17


@pytest.mark.parametrize("rows", [13, 600, 5000])
def test_many_rows_and_few(rows: int) -> None:
    x = _random(1, rows, 300)
    weight, bias, packed = _layer(300, 70)
    expected = F.linear(x, weight, bias)
    assert (packed_linear(x.float(), *packed) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("instructions", ["avx2", "portable"])
def test_other_instruction_sets(instructions: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("VISION_BACKBONES_NATIVE_ISA", instructions)
    monkeypatch.setenv("CXX", "c++ -O1")  # compiles in half the time
    monkeypatch.setattr(build, "_COMMON_FLAGS", ["-std=c++17", "-O1", "-fPIC", "-shared"])
    monkeypatch.setattr(build, "_kernels", {})
    x, scale = _random(2, 9, 21), _random(2, 21, seed=4)
    weight, bias, packed = _layer(21, 27)
    expected = F.gelu(F.linear(x * scale[:, None], weight, bias))
    out, energy = packed_linear_energy(x.float(), *packed, "gelu", scale.float())
    assert (out - expected).abs().max() < 2e-6 * expected.abs().max()
    assert (energy - expected.square().sum(1)).abs().max() < 2e-6 * energy.max()
    assert native.status("linear").instruction_set == instructions


def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    _, _, packed = _layer(128, 300)
    for rows in (60, 900):  # shared out by panels, and by rows
        x, outs = _random(2, rows, 128).float(), []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                outs.append((packed_linear(x, *packed), *packed_linear_energy(x, *packed)))
        finally:
            torch.set_num_threads(threads)
        for one, two in zip(*outs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-4)


def test_nan_and_infinity_pass() -> None:
    x = torch.zeros(1, 5, 16)
    x[0, 1, 3], x[0, 2, 3] = float("nan"), float("inf")
    packed = pack_weight(torch.ones(20, 16)), torch.zeros(20)
    for activation in ("relu", "gelu", "silu"):
        out = packed_linear(x, *packed, activation)
        assert out[0, 1].isnan().all() and out[0, 3:].eq(0).all()
    assert packed_linear(x, *packed)[0, 2].isinf().all()


def test_no_rows_give_no_rows() -> None:
    assert packed_linear(
        torch.empty(0, 4), pack_weight(torch.ones(3, 4)), torch.zeros(3)
    ).shape == (
        0,
        3,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "tanh"}, "activation must be one of"),
        ({"combination": "add"}, "combination must be one of"),
        ({"x": torch.zeros(2, 6)}, "got .2, 6."),
        ({"x": torch.zeros(2, 99)}, "got .2, 99."),
        ({"other": torch.zeros(2, 4), "combination": "add"}, r"other must be .2, 3., got .2, 4."),
        ({"scale": torch.zeros(1, 5)}, r"scale must be .2, 5., got .1, 5."),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message) -> None:
    packed = pack_weight(torch.zeros(3, 5)), torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        packed_linear(arguments.pop("x", torch.zeros(2, 5)), *packed, **arguments)


def test_unsupported_says_why() -> None:
    cpu = torch.device("cpu")
    assert unsupported(cpu, torch.float32) is None
    assert "cuda" in unsupported(torch.device("cuda"), torch.float32)
    assert "bfloat16" in unsupported(cpu, torch.bfloat16)


def test_without_the_kernel(monkeypatch) -> None:
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "0")
    monkeypatch.setattr(build, "_kernels", {})
    assert "VISION_BACKBONES_NATIVE=0" in unsupported(torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="switched off"):
        packed_linear(torch.zeros(1, 4), torch.zeros(64), torch.zeros(3))


def test_compiles_and_has_a_fake() -> None:
    packed = pack_weight(torch.ones(20, 16)), torch.zeros(20)
    x, other, scale = torch.zeros(2, 3, 16), torch.zeros(2, 3, 20), torch.ones(2, 16)
    ops = torch.ops.vision_backbones
    torch.library.opcheck(ops.packed_linear.default, (x, *packed, "relu", other, "add", scale))
    torch.library.opcheck(ops.packed_linear_energy.default, (x, *packed, "relu", None))
