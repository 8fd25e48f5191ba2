"""Every backend of gated linear attention against the scan in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scan_inputs import cast, difference, inputs

from ops.linear_attention import chunked, gated_linear_attention

EXACT = {"chunked": torch.float64, "cpu": torch.float32}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
VARIANTS = list(itertools.product((False, True), (False, True)))  # back, bonus


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("back", "bonus"), VARIANTS)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 100])
def test_equals_the_scan(backend, back, bonus, tokens):
    given = inputs(tokens, back=back, bonus=bonus)
    expected = gated_linear_attention(**given, backend="reference")
    out = gated_linear_attention(**cast(given, EXACT[backend]), backend=backend)
    assert difference(out, expected) < TOLERANCE[EXACT[backend]]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("states", [(16, 32), (32, 64), (64, 64), (3, 17), (5, 100)])
def test_states_of_any_size(backend, states):
    given = inputs(37, *states, bonus=True)
    expected = gated_linear_attention(**given, backend="reference")
    out = gated_linear_attention(**cast(given, EXACT[backend]), backend=backend)
    assert difference(out, expected) < TOLERANCE[EXACT[backend]]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("extremes", [(-100.0,), (0.0,), (-torch.inf,), (-1e-6, -1e4)])
@pytest.mark.parametrize("bonus", [False, True])
def test_extreme_gates(backend, extremes, bonus):
    given = inputs(200, bonus=bonus, extremes=extremes)
    expected = gated_linear_attention(**given, backend="reference")
    out = gated_linear_attention(**cast(given, EXACT[backend]), backend=backend)
    assert difference(out, expected) < TOLERANCE[EXACT[backend]]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("extreme", [0.0, -100.0])
def test_gates_that_are_all_extreme(backend, extreme):
    """Nothing is forgotten: prefix sums; everything is: each token alone."""
    given = inputs(65, back=False)
    given["log_gate"] = torch.full_like(given["log_gate"], extreme)
    query, key, value = given["query"], given["key"], given["value"]
    pairs = torch.einsum("bthk,bshk->bhts", query, key) * query.shape[-1] ** -0.5
    pairs = pairs.tril() if extreme == 0 else pairs.diagonal(dim1=-2, dim2=-1).diag_embed()
    expected = torch.einsum("bhts,bshv->bthv", pairs, value)
    out = gated_linear_attention(**cast(given, EXACT[backend]), backend=backend)
    assert difference(out, expected) < TOLERANCE[EXACT[backend]]


@pytest.mark.slow
@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("tokens", [1023, 4096])
def test_long_sequences(backend, bonus, tokens):
    given = inputs(tokens, 16, 32, bonus=bonus, batch=1, extremes=(-100.0, 0.0, -1e-4))
    expected = gated_linear_attention(**given, backend="reference")
    out = gated_linear_attention(**cast(given, EXACT[backend]), backend=backend)
    # float32 gates and sums of thousands of tokens.
    assert difference(out, expected) < 5 * TOLERANCE[EXACT[backend]]


@pytest.mark.parametrize("bonus", [False, True])
def test_chunks_of_any_size(bonus):
    given = inputs(50, bonus=bonus)
    expected = chunked.attend(**given, scale=0.5)
    for chunk in (1, 3, 16, 50, 64):
        out = chunked.attend(**given, scale=0.5, chunk=chunk)
        assert difference(out, expected) < 1e-13


def gradients_of(given, backend, dtype):
    """By name, of a sum of random shares of the output."""
    tensors = {n: t.to(dtype).requires_grad_() for n, t in given.items() if t is not None}
    out = gated_linear_attention(**tensors, backend=backend)
    generator = torch.Generator().manual_seed(1)
    share = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(dtype)
    gradients = torch.autograd.grad(
        (out * share).sum(), list(tensors.values()), materialize_grads=True, allow_unused=True
    )
    return dict(zip(tensors, gradients, strict=True))


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("back", "bonus"), VARIANTS)
@pytest.mark.parametrize(
    ("tokens", "dim", "value_dim"), [(1, 8, 5), (17, 3, 17), (50, 32, 64), (40, 64, 64)]
)
def test_gradients(backend, back, bonus, tokens, dim, value_dim):
    given = inputs(tokens, dim, value_dim, back=back, bonus=bonus, heads=2)
    expected = gradients_of(given, "reference", torch.float64)
    gradients = gradients_of(given, backend, EXACT[backend])
    for name, exact in expected.items():
        scale = exact.abs().max().clamp(min=1e-2)
        error = (gradients[name].double() - exact).abs().max() / scale
        assert error < 2 * TOLERANCE[EXACT[backend]], name


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("extremes", [(-100.0, 0.0), (-torch.inf,), (-1e-6, -1e4)])
def test_gradients_of_extreme_gates(backend, extremes):
    given = inputs(70, 16, 32, bonus=True, extremes=extremes, heads=2, batch=1)
    expected = gradients_of(given, "reference", torch.float64)
    gradients = gradients_of(given, backend, EXACT[backend])
    for name, exact in expected.items():
        assert exact.isfinite().all()
        assert difference(gradients[name], exact) < 3 * TOLERANCE[EXACT[backend]], name


@pytest.mark.parametrize("bonus", [False, True])
def test_gradcheck(bonus):
    given = inputs(18, 2, 1, bonus=bonus, batch=1, heads=2, extremes=(-20.0, 0.0))
    tensors = [t if t is None else t.requires_grad_() for t in given.values()]
    assert torch.autograd.gradcheck(gated_linear_attention, tensors)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v, g: gated_linear_attention(q, k, v, g), [t[:, :4] for t in tensors[:4]]
    )


@pytest.mark.parametrize("backend", ["reference", *EXACT])
def test_half_precision(backend):
    """States, gates and sums are of float32 nevertheless."""
    given = cast(inputs(80, 16, 32, bonus=True), torch.bfloat16)
    given["log_gate"] = given["log_gate"].float()  # which may be more precise
    expected = gated_linear_attention(**cast(given, torch.float64), backend="reference")
    out = gated_linear_attention(**given, backend=backend)
    assert out.dtype == torch.bfloat16
    # As the rounding of the output.
    assert difference(out, expected) < 2**-8


@pytest.mark.parametrize("backend", ["reference", *EXACT])
def test_strides_and_scale(backend):
    given = inputs(20, dtype=torch.float32)
    expected = 0.25 * gated_linear_attention(**given, scale=1.0)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]],
        lambda t: torch.cat((t, t), dim=2)[:, :, t.shape[2] :],
    ):
        moved = {name: t if t is None else layout(t) for name, t in given.items()}
        out = gated_linear_attention(**moved, scale=0.25, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", range(4))
def test_empty_inputs(axis):
    shape = [2, 3, 4, 5]
    shape[axis] = 0
    query = torch.zeros(shape, requires_grad=True)
    value = torch.zeros(*shape[:3], 6, requires_grad=True)
    out = gated_linear_attention(query, query, value, query, query)
    assert torch.equal(out, torch.zeros(*shape[:3], 6))
    out.sum().backward()


def test_rejects_bad_arguments():
    given = inputs(9, dtype=torch.float32, bonus=True)

    def message(**changes: Any) -> str:
        with pytest.raises(ValueError) as caught:
            gated_linear_attention(**{**given, **changes})
        return str(caught.value)

    assert "query must be (B, L, H, K)" in message(query=given["query"][0])
    assert "key must be (2, 9, 3, 8)" in message(key=given["key"][:, :8])
    assert "value must be (2, 9, 3, 5)" in message(value=given["value"][:1])
    assert "bonus must be (3, 8)" in message(bonus=given["bonus"][0])
    assert "log_gate must be torch.float32" in message(log_gate=given["log_gate"].double())
    assert "log_gate_back is on meta" in message(log_gate_back=given["log_gate"].to("meta"))
    assert "floating-point" in message(query=given["query"].int())
    half = cast(given, torch.bfloat16)
    for name in ("key", "value"):
        said = message(**{**half, name: given[name]})
        assert f"{name} must be torch.bfloat16 beside a query of torch.bfloat16" in said
    assert "one of reference, chunked, cpu, triton" in message(backend="gpu")
    for name in ("query", "key", "value", "log_gate"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
            gated_linear_attention(**{**given, name: None})
    with pytest.raises(TypeError, match="bonus must be a tensor, got 1"):
        gated_linear_attention(**{**given, "bonus": 1})
    with pytest.raises(NotImplementedError, match="'cpu' cannot do this call.*float64"):
        gated_linear_attention(**cast(given, torch.float64), backend="cpu")
