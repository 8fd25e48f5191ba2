"""Every backend of the selective scan against the scan in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scan_inputs import cast, difference, gradients_of, map_inputs, selective_inputs

from ops.selective_scan import (
    chunked,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    selective_scan,
)

EXACT = {"chunked": torch.float64, "cpu": torch.float32}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
STEPS = {"delta_softplus": True}


def assert_close(function, given, backend, factor=1.0, **options):
    """Compare the output and all gradients with those of the reference."""
    expected = gradients_of(function, given, torch.float64, **options, backend="reference")
    dtype = EXACT[backend]
    for name, got in gradients_of(function, given, dtype, **options, backend=backend).items():
        exact = expected[name]
        assert exact.isfinite().all()
        scale = exact.abs().max().clamp(min=1e-2)
        error = (got.double() - exact).abs().max() / scale
        assert error < factor * TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 100])
def test_output_and_gradients(backend, states, tokens):
    given = selective_inputs(tokens, states=states)
    assert_close(selective_scan, given, backend, 2, **STEPS)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(
    ("channels", "states", "groups"),
    [(8, 1, 1), (8, 16, 4), (64, 1, 4), (34, 3, 2), (16, 13, 1), (150, 1, 1), (3, 40, 1)],
)
def test_channels_states_and_groups(backend, channels, states, groups):
    given = selective_inputs(21, channels, states, groups)
    assert_close(selective_scan, given, backend, 2, **STEPS)


@pytest.mark.parametrize("backend", EXACT)
def test_optional_tensors_and_plain_steps(backend):
    given = {**selective_inputs(20), "D": None, "delta_bias": None}
    given["delta"] = given["delta"].exp()
    assert_close(selective_scan, given, backend, 2)
    given["D"] = torch.ones(8)
    assert_close(selective_scan, given, backend, 2)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("states", [1, 16])
def test_extreme_steps_and_rates(backend, states):
    given = selective_inputs(200, 12, states, extreme=True)
    assert_close(selective_scan, given, backend, 5, **STEPS)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("rate", [0.0, -1e30])
def test_nothing_or_everything_is_forgotten(backend, rate):
    """Prefix sums, or each token alone, by the formula."""
    given = {**selective_inputs(65), "A": torch.full((8, 1), rate, dtype=torch.float64)}
    step = torch.nn.functional.softplus(given["delta"] + given["delta_bias"][:, None])
    before, after = (given[n].squeeze(2).repeat_interleave(4, 1) for n in "BC")
    added = step * given["u"] * before
    states = added.cumsum(-1) if rate == 0 else added
    expected = after * states + given["D"][:, None] * given["u"]
    out = selective_scan(**cast(given, EXACT[backend]), **STEPS, backend=backend)
    assert difference(out, expected) < TOLERANCE[EXACT[backend]]


@pytest.mark.parametrize("z", [-200.0, -87.0, -20.0, -1e-3, 0.0, 1.0, 19.99, 20.01, 88.0, 1e4])
def test_softplus_is_accurate_everywhere(z):
    """A relative error of a few ulp, as one token's output is its step; tiny steps are 0."""
    given = {name: torch.ones(1, 1, 1) for name in ("u", "delta")}
    given["delta"] *= z
    out = selective_scan(
        *given.values(), -torch.ones(1, 1), *(torch.ones(1, 1, 1, 1),) * 2, **STEPS, backend="cpu"
    )
    exact = torch.nn.functional.softplus(torch.tensor(z, dtype=torch.float64), threshold=1e6)
    assert (out.double() - exact).abs().item() <= 3e-7 * exact.item() + 2e-38


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value):
    given = selective_inputs(40, dtype=torch.float32)
    given["u"][0, 3, 20] = value
    for backend in EXACT:
        out = selective_scan(**given, **STEPS, backend=backend)
        assert not out[0, 3, 20].isfinite() and out[0, 3, :20].isfinite().all()
        assert out[1].isfinite().all() and out[0, :3].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("tokens", [1023, 4096])
def test_long_sequences(backend, extreme, states, tokens):
    given = selective_inputs(tokens, 4, states, extreme=extreme)
    # Sums of thousands of tokens in their order: the scan in Python loses 6e-5 in float32.
    assert_close(selective_scan, given, backend, 40, **STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", EXACT)
def test_long_memory(backend):
    """Steps as at initialisation, so small that decays are near 1, for an image's tokens."""
    given = selective_inputs(3136, 4)
    given["A"], given["delta_bias"] = -torch.ones(4, 1), torch.full((4,), -6.9)
    given["delta"] = given["delta"] / 10
    assert_close(selective_scan, given, backend, 10, **STEPS)


@pytest.mark.parametrize("states", [1, 16])
def test_chunks_of_any_size(states):
    given = {**selective_inputs(50, states=states), **STEPS}
    expected = chunked.scan(**given)
    for chunk in (2, 3, 7, 50, 64):
        assert difference(chunked.scan(**given, chunk=chunk), expected) < 1e-13


def test_gradcheck():
    given = selective_inputs(17, 1, 2, 1)
    tensors = [t[:1].requires_grad_() if t.ndim > 2 else t.requires_grad_() for t in given.values()]

    def scan(*tensors):
        return selective_scan(*tensors[:6], delta_bias=tensors[6], **STEPS)

    assert torch.autograd.gradcheck(scan, tensors)
    short = [t[..., :3] if t.ndim > 2 else t for t in tensors]
    assert torch.autograd.gradgradcheck(scan, short)


@pytest.mark.parametrize("backend", ["reference", *EXACT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("states", [1, 16])
def test_half_precision(backend, dtype, states):
    """Steps, states and sums are float32 nevertheless, and parameters may be."""
    given = cast(selective_inputs(80, states=states), dtype)
    for name in ("A", "D", "delta_bias"):
        given[name] = given[name].float()
    expected = selective_scan(**cast(given, torch.float64), **STEPS, backend="reference")
    out = selective_scan(**given, **STEPS, backend=backend)
    assert out.dtype == dtype
    # As the rounding of the output.
    assert difference(out, expected) < torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", EXACT)
def test_gradients_in_half_precision(backend):
    """Their dtypes are those of the tensors; delta, B and C may have another one than u."""
    given = cast(selective_inputs(40, states=3), torch.bfloat16)
    given = {n: t if n in ("u", "B", "C") else t.float() for n, t in given.items()}
    tensors = {n: t.requires_grad_() for n, t in given.items()}
    out = selective_scan(**tensors, **STEPS, backend=backend)
    grads = torch.autograd.grad(out.float().square().sum(), list(tensors.values()))
    exact = {n: t.detach().double().requires_grad_() for n, t in given.items()}
    out = selective_scan(**exact, **STEPS, backend="reference")
    expected = torch.autograd.grad(out.square().sum(), list(exact.values()))
    for name, grad, of in zip(tensors, grads, expected, strict=True):
        assert grad.dtype == given[name].dtype
        assert difference(grad, of) < 2e-2, name


@pytest.mark.parametrize("backend", ["reference", *EXACT])
def test_strides(backend):
    given = selective_inputs(20, states=3, dtype=torch.float32)
    expected = selective_scan(**given, **STEPS)
    for layout in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]],
        lambda t: torch.cat((t, t), dim=1)[:, t.shape[1] :],
        lambda t: t.flip(-1).contiguous().flip(-1),
        lambda t: t[:1].expand(t.shape) if len(t) == 2 else t,
    ):
        moved = {n: layout(t) if t.ndim > 1 else t for n, t in given.items()}
        wanted = expected
        if moved["u"].stride(0) == 0:
            wanted = selective_scan(**{n: t.clone() for n, t in moved.items()}, **STEPS)
        out = selective_scan(**moved, **STEPS, backend=backend)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", range(3))
def test_empty_inputs(axis):
    sizes = [2, 4, 3]
    sizes[axis] = 0
    batch, channels, tokens = sizes
    u = torch.zeros(batch, channels, tokens, requires_grad=True)
    shared = torch.zeros(batch, 1, 1, tokens)
    out = selective_scan(u, u, torch.zeros(channels, 1), shared, shared)
    assert out.shape == u.shape
    out.sum().backward()


def test_rejects_bad_arguments():
    given = selective_inputs(9, dtype=torch.float32)

    def message(**changes: Any) -> str:
        with pytest.raises(ValueError) as caught:
            selective_scan(**{**given, **changes})
        return str(caught.value)

    assert "u must have 3 dimensions" in message(u=given["u"][0])
    assert "delta must be (2, 8, 9) beside u of (2, 8, 9)" in message(delta=given["delta"][:1])
    assert "A must be (8, 1) beside u" in message(A=given["A"][:4])
    assert "C must be (2, 2, 1, 9)" in message(C=given["C"][..., :4])
    assert "groups that divide 8 channels, got 3" in message(B=torch.zeros(2, 3, 1, 9))
    assert "got 0" in message(B=torch.zeros(2, 0, 1, 9))
    assert "D must be (8,)" in message(D=given["D"][:2])
    assert "delta_bias must be torch.float32 beside" in message(delta_bias=given["D"].double())
    assert "delta is on meta, u on cpu" in message(delta=given["delta"].to("meta"))
    assert "floating-point" in message(u=given["u"].int())
    assert "one of reference, chunked, cpu, triton" in message(backend="gpu")
    with pytest.raises(NotImplementedError, match="'cpu' cannot do this call.*float64"):
        selective_scan(**cast(given, torch.float64), backend="cpu")
    with pytest.raises(TypeError, match="B must be a tensor, got None"):
        selective_scan(**{**given, "B": None})


# -- maps in four orders -------------------------------------------------------------------------

SIDES = [(1, 1), (3, 5), (7, 7), (1, 40), (40, 1), (16, 9)]


@pytest.mark.parametrize("function", [selective_scan, cross_selective_scan])
def test_later_calls_do_the_same(function):
    """Calls of a known layout take a shorter path, which checks nothing again."""
    given = selective_inputs(20) if function is selective_scan else map_inputs(4, 5)
    given = cast(given, torch.float32)
    first = function(**given, **STEPS)
    assert torch.equal(function(**given, **STEPS), first)
    other = {**given, "A": given["A"] * 2}
    expected = function(**other, **STEPS, backend="reference")
    torch.testing.assert_close(function(**other, **STEPS), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="A must be"):
        function(**{**given, "A": given["A"][:-1]}, **STEPS)
    with pytest.raises(ValueError, match="backend must be"):
        function(**given, **STEPS, backend="mamba")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(**given, **STEPS), first)
    rate = given["A"].clone().requires_grad_()
    assert function(**{**given, "A": rate}, **STEPS).grad_fn is not None


def test_the_four_orders():
    """Row by row, column by column, and both in reverse."""
    x = torch.arange(6).view(1, 2, 3, 1)
    assert cross_scan(x)[0, :, 0].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    assert torch.equal(cross_merge(cross_scan(x), 2, 3), 4 * x)


@pytest.mark.parametrize(("height", "width"), SIDES)
def test_merge_is_the_adjoint_of_scan(height, width):
    x = torch.randn(2, height, width, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 3, height * width, dtype=torch.float64, requires_grad=True)
    merged, scanned = cross_merge(y, height, width), cross_scan(x)
    torch.testing.assert_close((scanned * y).sum(), (x * merged).sum())
    (of_x,) = torch.autograd.grad((scanned * y.detach()).sum(), x)
    torch.testing.assert_close(of_x, merged)
    (of_y,) = torch.autograd.grad((merged * x.detach()).sum(), y)
    torch.testing.assert_close(of_y, scanned)


def test_merge_rejects_other_sizes():
    with pytest.raises(ValueError, match=r"y must be \(B, 4, C, 2 · 3 = 6\), got \(1, 4, 5, 7\)"):
        cross_merge(torch.zeros(1, 4, 5, 7), 2, 3)
    with pytest.raises(ValueError, match=r"got \(1, 2, 5, 6\)"):
        cross_merge(torch.zeros(1, 2, 5, 6), 2, 3)


def composed(x, projected, delta_weight, A, D=None, delta_bias=None):
    """The four sequences and their sum, by the formulas of the orders and the reference."""
    batch, height, width, channels = x.shape
    rank, states = delta_weight.shape[2], A.shape[1]
    numbers = projected.unflatten(-1, (4, -1)).unbind(-2)
    outs = 0
    for k, of_pixel in enumerate(numbers):
        rows = slice(k * channels, (k + 1) * channels)

        def sequence(t, k=k):
            t = t.transpose(1, 2) if k % 2 else t
            t = t.reshape(batch, height * width, -1).mT
            return t.flip(-1) if k > 1 else t

        steps, before, after = sequence(of_pixel).split([rank, states, states], 1)
        out = selective_scan(
            sequence(x),
            delta_weight[k] @ steps,
            A[rows],
            before[:, None],
            after[:, None],
            None if D is None else D[rows],
            delta_bias=None if delta_bias is None else delta_bias[rows],
            delta_softplus=True,
            backend="reference",
        )
        out = (out.flip(-1) if k > 1 else out).mT
        sides = (width, height) if k % 2 else (height, width)
        out = out.reshape(batch, *sides, channels)
        outs = outs + (out.transpose(1, 2) if k % 2 else out)
    return outs


@pytest.mark.parametrize("backend", ["reference", *EXACT])
@pytest.mark.parametrize(("height", "width"), SIDES)
@pytest.mark.parametrize("states", [1, 16])
def test_a_map_in_four_orders(backend, height, width, states):
    given = map_inputs(height, width, states=states)
    expected = gradients_of(composed, given, torch.float64)
    dtype = EXACT.get(backend, torch.float64)
    found = gradients_of(cross_selective_scan, given, dtype, **STEPS, backend=backend)
    for name, exact in expected.items():
        scale = exact.abs().max().clamp(min=1e-2)
        assert (found[name].double() - exact).abs().max() / scale < 2 * TOLERANCE[dtype], name


@pytest.mark.parametrize(("channels", "rank", "states"), [(96, 6, 1), (20, 2, 16), (150, 10, 3)])
def test_channels_of_a_map(channels, rank, states):
    given = map_inputs(5, 6, channels, states, rank)
    assert_close(cross_selective_scan, given, "cpu", 2, **STEPS)
    given = {**given, "D": None, "delta_bias": None}
    assert_close(cross_selective_scan, given, "cpu", 2, **STEPS)


@pytest.mark.parametrize("backend", ["reference", *EXACT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_map_in_half_precision(backend, dtype):
    given = map_inputs(7, 9, 20, dtype=torch.float32)
    for name in ("x", "projected"):
        given[name] = given[name].to(dtype)
    expected = cross_selective_scan(**cast(given, torch.float64), **STEPS, backend="reference")
    out = cross_selective_scan(**given, **STEPS, backend=backend)
    assert out.dtype == dtype
    assert difference(out, expected) < torch.finfo(dtype).eps


def test_a_map_that_is_not_dense():
    given = map_inputs(4, 5, 20, dtype=torch.float32)
    expected = cross_selective_scan(**given, **STEPS, backend="cpu")
    moved = {n: t.movedim(-1, 0).contiguous().movedim(0, -1) for n, t in given.items()}
    out = cross_selective_scan(**moved, **STEPS, backend="cpu")
    assert torch.equal(out, expected)


def test_rejects_bad_maps():
    given = map_inputs(3, 4, dtype=torch.float32)

    def message(**changes: Any) -> str:
        with pytest.raises(ValueError) as caught:
            cross_selective_scan(**{**given, **changes})
        return str(caught.value)

    assert "x must have 4 dimensions" in message(x=given["x"][0])
    assert "projected must be (2, 3, 4, 20) beside x of" in message(projected=given["x"])
    assert "delta_weight must be (4, 5, 3)" in message(delta_weight=given["delta_weight"][:2])
    assert "A must be (20, 1)" in message(A=given["A"][:5])
    assert "delta_bias must be (20,)" in message(delta_bias=given["D"][:5])
