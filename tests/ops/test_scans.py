"""The scans: every backend against the reference in float64, and the reference against formulas."""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from compiled_kernels import forget_kernels
from fresh_python import run_code
from scan_inputs import cast, difference, gradients_of, inputs, map_inputs, selective_inputs
from torch import Tensor, nn
from torch.export import Dim
from triton_runs import run_cases

from ops import bi_wkv, linear_attention, selective_scan
from ops.cpu import build

FOLDER = Path(__file__).parent
EXACT = {"chunked": torch.float64, "cpu": torch.float32}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
every_backend = pytest.mark.parametrize("backend", EXACT)


def wkv_inputs(tokens: int, dim: int = 11, batch: int = 2) -> dict[str, Tensor]:
    """Decays from the ends of the published initialisation."""
    generator = torch.Generator().manual_seed(tokens)
    key, value = torch.randn(2, batch, tokens, dim, generator=generator, dtype=torch.float64)
    decay = torch.linspace(-5, 3, dim, dtype=torch.float64) / tokens
    first = torch.randn(dim, generator=generator, dtype=torch.float64) / tokens
    return {"key": key, "value": value, "decay": decay, "first": first}


class Scan(NamedTuple):
    """A function, tensors for it, and the kernel behind it."""

    function: Callable[..., Tensor]
    inputs: Callable[[int], dict[str, Any]]  # of a number of tokens
    maps: tuple[str, ...]  # of images, in the others' dtype or a narrower one
    axis: int | None  # of the tokens
    options: dict[str, Any]
    library: str


STEPS = {"delta_softplus": True}
SCANS = {
    "bi_wkv": Scan(bi_wkv.bi_wkv, wkv_inputs, ("key", "value"), 1, {}, "wkv"),
    "bi_wkv in segments": Scan(
        bi_wkv.bi_wkv, wkv_inputs, ("key", "value"), 1, {"segments": 4}, "wkv"
    ),
    "gated_linear_attention": Scan(
        linear_attention.gated_linear_attention, lambda tokens: inputs(tokens, bonus=True),
        ("query", "key", "value", "log_gate", "log_gate_back", "bonus"), 1, {}, "gated_scan",
    ),
    "selective_scan": Scan(
        selective_scan.selective_scan, lambda tokens: selective_inputs(tokens, states=2),
        ("u", "delta", "B", "C"), -1, STEPS, "selective_scan",
    ),
    "cross_selective_scan": Scan(
        selective_scan.cross_selective_scan, lambda tokens: map_inputs(3, tokens // 3),
        ("x", "projected"), None, STEPS, "selective_scan",
    ),
}  # fmt: skip
every_scan = pytest.mark.parametrize("name", SCANS)


def _single(name: str, tokens: int = 33) -> dict[str, Tensor]:
    found = SCANS[name].inputs(tokens)
    return {n: t.float() for n, t in found.items() if t is not None}


def _run(name: str, tensors: dict[str, Any], backend: str | None = None) -> Tensor:
    return SCANS[name].function(**tensors, **SCANS[name].options, backend=backend)


# ---- every backend is the reference ------------------------------------------------------------
def _cases() -> Iterator[tuple[str, dict[str, Any], float]]:
    """A scan, its inputs, and how many times the tolerance its gradients may be off."""
    both = list(itertools.product((False, True), (False, True)))
    sizes = [(1, 8, 5), (2, 8, 5), (16, 8, 5), (17, 3, 17), (50, 32, 64), (40, 64, 64), (100, 8, 5)]
    for (back, bonus), size in itertools.product(both, sizes):
        yield "gated_linear_attention", inputs(*size, back=back, bonus=bonus, heads=2), 2
    for states in ((16, 32), (3, 17), (5, 100)):
        yield "gated_linear_attention", inputs(37, *states, bonus=True), 2
    for extremes in ((-100.0, 0.0), (0.0,), (-torch.inf,), (-1e-6, -1e4)):
        given = inputs(200, 16, 32, bonus=True, extremes=extremes, heads=1, batch=1)
        yield "gated_linear_attention", given, 3
    for tokens, states in itertools.product((1, 2, 15, 16, 17, 100), (1, 16)):
        yield "selective_scan", selective_inputs(tokens, states=states), 2
    for size in ((8, 1, 1), (8, 16, 4), (64, 1, 4), (34, 3, 2), (16, 13, 1), (150, 1, 1)):
        yield "selective_scan", selective_inputs(21, *size), 2
    yield "selective_scan", selective_inputs(21, 3, 40, 1), 2
    for states in (1, 16):
        yield "selective_scan", selective_inputs(200, 12, states, extreme=True), 5
    given = {**selective_inputs(20), "D": None, "delta_bias": None}
    yield "selective_scan", given, 2
    yield "selective_scan", {**given, "delta": given["delta"].exp(), "delta_softplus": False}, 2
    for channels, rank, states in ((96, 6, 1), (20, 2, 16), (150, 10, 3)):
        given = map_inputs(5, 6, channels, states, rank)
        yield "cross_selective_scan", given, 2
        yield "cross_selective_scan", {**given, "D": None, "delta_bias": None}, 2


def _check(name: str, given: dict[str, Any], backend: str, factor: float) -> None:
    """Compare the output and all gradients with those of the reference."""
    scan, dtype = SCANS[name], EXACT[backend]
    options = {n: given.get(n, value) for n, value in scan.options.items()}
    given = {n: t for n, t in given.items() if n not in options}
    expected = gradients_of(scan.function, given, torch.float64, **options, backend="reference")
    found = gradients_of(scan.function, given, dtype, **options, backend=backend)
    for argument, exact in expected.items():
        assert exact.isfinite().all()
        times = 1 if argument == "out" and scan.library == "gated_scan" else factor
        error = (found[argument].double() - exact).abs().max() / exact.abs().max().clamp(min=1e-2)
        assert error < times * TOLERANCE[dtype], argument


@every_backend
@pytest.mark.parametrize(
    ("name", "given", "factor"),
    [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(_cases())],
)
def test_is_the_reference(name: str, given: dict[str, Any], factor: float, backend: str) -> None:
    _check(name, given, backend, factor)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("tokens", [1023, 4096])
def test_long_sequences(backend: str, tokens: int) -> None:
    """Sums of thousands of tokens in their order: the scan in Python loses 6e-5 in float32."""
    for bonus in (False, True):
        extremes = (-100.0, 0.0, -1e-4)
        given = inputs(tokens, 16, 32, bonus=bonus, batch=1, extremes=extremes)
        expected = _run("gated_linear_attention", given, "reference")
        out = _run("gated_linear_attention", cast(given, EXACT[backend]), backend)
        assert difference(out, expected) < 5 * TOLERANCE[EXACT[backend]]
    for states, extreme in itertools.product((1, 16), (False, True)):
        _check("selective_scan", selective_inputs(tokens, 4, states, extreme=extreme), backend, 40)
    # Steps as at initialisation, so small that decays are near 1, for an image's tokens.
    given = selective_inputs(3136, 4)
    given["A"], given["delta_bias"] = -torch.ones(4, 1), torch.full((4,), -6.9)
    _check("selective_scan", {**given, "delta": given["delta"] / 10}, backend, 10)


def _wkv_cases() -> dict[str, tuple[dict[str, Tensor], float, float]]:
    """Inputs, and how far outputs and gradients may be off."""
    cases = {
        f"{tokens} tokens": (wkv_inputs(tokens), 3e-6, 1e-5)
        for tokens in (1, 2, 5, 31, 32, 33, 64, 196, 400)
    }
    position = torch.arange(45)[:, None]
    random = torch.rand(45, 1, generator=torch.Generator().manual_seed(0))
    for masked, mask in {
        "head": position < 20,
        "tail": position >= 40,
        "most": random < 0.6,
        "all but one": position != 7,
    }.items():
        given = wkv_inputs(45)
        given["key"][0].masked_fill_(mask, -torch.inf)  # in one image
        cases[f"masked {masked}"] = given, 3e-6, 2e-5
    given = wkv_inputs(70, dim=3)
    cases["no decay"] = {**given, "decay": torch.zeros(3, dtype=torch.float64)}, 3e-6, 1e-4
    return cases


WKV = _wkv_cases()


@every_backend
@pytest.mark.parametrize("segments", [None, 32])
@pytest.mark.parametrize("case", WKV)
def test_bi_wkv_is_the_reference(case: str, segments: int | None, backend: str) -> None:
    """Masked tokens have no weight and no gradient, wherever they are."""
    given, of_out, of_gradients = WKV[case]
    _check_wkv(given, segments, backend, of_out, of_gradients)


def _check_wkv(
    given: dict[str, Tensor], segments: int | None, backend: str, of_out: float, of_gradients: float
) -> None:
    options = {"segments": segments}
    exact = gradients_of(bi_wkv.bi_wkv, given, torch.float64, **options, backend="reference")
    found = gradients_of(bi_wkv.bi_wkv, given, torch.float32, **options, backend=backend)
    torch.testing.assert_close(found["out"].double(), exact["out"], rtol=of_out, atol=of_out)
    for name, want in exact.items():
        assert found[name].isfinite().all()
        assert (found[name] - want).abs().max() <= of_gradients * max(1, want.abs().max()), name
    hidden = given["key"].isneginf()
    for name in ("key", "value"):  # the kernel's exponentials end at the smallest normal number
        assert not hidden.any() or found[name][hidden].abs().max() < 1e-30


@every_backend
@pytest.mark.parametrize("scale", [80.0, 1e4])
@pytest.mark.parametrize("step", [0.0, 3.0, -3.0, 200.0, -200.0])
def test_extreme_keys_and_decays(backend: str, scale: float, step: float) -> None:
    given = wkv_inputs(45)
    given |= {"key": given["key"] * scale, "first": given["first"] * 50}
    given["decay"] = torch.full_like(given["decay"], step)
    # Exponents of up to 1e4 are known to 1e-3 in float32.
    _check_wkv({n: t.float().double() for n, t in given.items()}, None, backend, 2e-2, 2e-2)


@every_backend
def test_large_decays_with_segments(backend: str) -> None:
    """Sums that cancel; they are as large as the exponential of a segment."""
    given = {**wkv_inputs(100), "decay": torch.linspace(-40, 40, 11, dtype=torch.float64)}
    expected = bi_wkv.bi_wkv(**given, segments=32, backend="reference")
    out = bi_wkv.bi_wkv(**cast(given, torch.float32), segments=32, backend=backend)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", *EXACT])
def test_an_image_without_tokens_that_count(backend: str) -> None:
    """It is NaN, as a softmax over nothing is; the other images are as they would be alone."""
    given = cast(wkv_inputs(20), torch.float32)
    given["key"][1] = -torch.inf
    out = bi_wkv.bi_wkv(**given, backend=backend)
    assert out[1].isnan().all()
    alone = {n: t[:1] if t.ndim == 3 else t for n, t in given.items()}
    torch.testing.assert_close(out[:1], bi_wkv.bi_wkv(**alone, backend=backend))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    given = selective_inputs(40, dtype=torch.float32)
    given["u"][0, 3, 20] = value
    for backend in EXACT:
        out = _run("selective_scan", given, backend)
        assert not out[0, 3, 20].isfinite() and out[0, 3, :20].isfinite().all()
        assert out[1].isfinite().all() and out[0, :3].isfinite().all()


# ---- the reference is the formula --------------------------------------------------------------
@pytest.mark.parametrize("segments", [None, 3])
def test_bi_wkv_by_hand(segments: int | None) -> None:
    given = wkv_inputs(13)
    out = bi_wkv.bi_wkv(**given, segments=segments, backend="reference")
    key, value, w, u = (t[0, :, 0] if t.ndim == 3 else float(t[0]) for t in given.values())
    length = 13 if segments is None else math.ceil(13 / segments)
    for t in range(13):
        begin = t if segments is None else t // length * length
        numerator = denominator = 0.0
        for i in range(13):
            if i == t:
                weight = math.exp(u + key[t])
            elif segments is None or begin <= i < t:
                weight = math.exp(key[i] - w * (abs(t - i) - 1))
            else:
                weight = math.exp(key[i] - w * abs(t - i))
            if begin < i <= t:
                weight -= (math.exp(w) - 1) * math.exp(key[i] + w * (t - i))
            numerator += weight * value[i]
            denominator += weight
        torch.testing.assert_close(out[0, t, 0], numerator / denominator)


@pytest.mark.parametrize("backend", ["reference", *EXACT])
@pytest.mark.parametrize("extreme", [0.0, -100.0])
def test_gates_that_are_all_extreme(backend: str, extreme: float) -> None:
    """Nothing is forgotten: prefix sums; everything is: each token alone."""
    given = inputs(65, back=False)
    given["log_gate"] = torch.full_like(given["log_gate"], extreme)
    query, key, value = given["query"], given["key"], given["value"]
    pairs = torch.einsum("bthk,bshk->bhts", query, key) * query.shape[-1] ** -0.5
    pairs = pairs.tril() if extreme == 0 else pairs.diagonal(dim1=-2, dim2=-1).diag_embed()
    expected = torch.einsum("bhts,bshv->bthv", pairs, value)
    dtype = EXACT.get(backend, torch.float64)
    out = _run("gated_linear_attention", cast(given, dtype), backend)
    assert difference(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["reference", *EXACT])
@pytest.mark.parametrize("rate", [0.0, -1e30])
def test_nothing_or_everything_is_forgotten(backend: str, rate: float) -> None:
    given = {**selective_inputs(65), "A": torch.full((8, 1), rate, dtype=torch.float64)}
    step = F.softplus(given["delta"] + given["delta_bias"][:, None])
    before, after = (given[n].squeeze(2).repeat_interleave(4, 1) for n in "BC")
    added = step * given["u"] * before
    states = added.cumsum(-1) if rate == 0 else added
    expected = after * states + given["D"][:, None] * given["u"]
    dtype = EXACT.get(backend, torch.float64)
    out = _run("selective_scan", cast(given, dtype), backend)
    assert difference(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("z", [-200.0, -87.0, -20.0, -1e-3, 0.0, 1.0, 19.99, 20.01, 88.0, 1e4])
def test_softplus_is_accurate_everywhere(z: float) -> None:
    """A relative error of a few ulp, as one token's output is its step; tiny steps are 0."""
    one = torch.ones(1, 1, 1)
    given = {"u": one, "delta": z * one, "A": -one[0], "B": one[None], "C": one[None]}
    out = _run("selective_scan", given, "cpu")
    exact = F.softplus(torch.tensor(z, dtype=torch.float64), threshold=1e6)
    assert (out.double() - exact).abs().item() <= 3e-7 * exact.item() + 2e-38


SECOND: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    **{
        f"bi_wkv {n}": (functools.partial(bi_wkv.bi_wkv, segments=n), wkv_inputs(5, 1))
        for n in (None, 3)
    },
    **{
        f"gated_linear_attention {bonus}": (
            linear_attention.gated_linear_attention,
            inputs(4, 2, 1, bonus=bonus, batch=1, heads=2, extremes=(-20.0, 0.0)),
        )
        for bonus in (False, True)
    },
    "selective_scan": (
        functools.partial(selective_scan.selective_scan, **STEPS), selective_inputs(3, 1, 2, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name: str) -> None:
    function, given = SECOND[name]
    given = {n: t.requires_grad_() for n, t in given.items() if t is not None}

    def named(*tensors: Tensor) -> Tensor:
        return function(**dict(zip(given, tensors, strict=True)))

    assert torch.autograd.gradgradcheck(named, list(given.values()))


# ---- dtypes, layouts, sizes --------------------------------------------------------------------
@every_scan
@pytest.mark.parametrize("backend", ["reference", *EXACT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, backend: str, dtype: torch.dtype) -> None:
    """Sums and states are float32 nevertheless, and parameters may be; gradients have dtypes."""
    given = _single(name, 81)
    given = {n: t.to(dtype) if n in SCANS[name].maps else t for n, t in given.items()}
    exact = gradients_of(
        SCANS[name].function, given, torch.float64, **SCANS[name].options, backend="reference"
    )
    leaves = {n: t.requires_grad_() for n, t in given.items()}
    if (name, backend, dtype) == ("gated_linear_attention", "cpu", torch.float16):
        with pytest.raises(NotImplementedError, match="float32 and bfloat16, not torch.float16"):
            _run(name, leaves, backend)
        return
    out = _run(name, leaves, backend)
    assert out.dtype == dtype
    assert difference(out, exact["out"]) < torch.finfo(dtype).eps / 2  # as the output is rounded
    generator = torch.Generator().manual_seed(1)
    share = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    for (n, leaf), grad in zip(
        leaves.items(), torch.autograd.grad(out, list(leaves.values()), share), strict=True
    ):
        assert grad.dtype == leaf.dtype
        assert difference(grad, exact[n]) < 2e-2, n


@every_scan
@pytest.mark.parametrize("backend", [None, "cpu", "chunked", "reference"])
def test_autocast_leaves_sums_alone(name: str, backend: str | None) -> None:
    """Also of maps in bfloat16 beside parameters in float32, and for gradients."""
    for dtype in (torch.bfloat16, torch.float32):
        given = _single(name)
        given = {n: t.to(dtype) if n in SCANS[name].maps else t for n, t in given.items()}
        tensors = {n: t.requires_grad_() for n, t in given.items()}
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = _run(name, tensors, backend)
            grads = torch.autograd.grad(out.float().square().sum(), list(tensors.values()))
            results.append((out, *grads))
        assert results[0][0].dtype == dtype
        assert all(map(torch.equal, *results))


@every_scan
@pytest.mark.parametrize("backend", ["reference", *EXACT])
def test_strides(name: str, backend: str) -> None:
    given = _single(name, 20 if SCANS[name].axis else 21)
    expected = _run(name, given)
    for layout in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]],
        lambda t: torch.cat((t, t), dim=1)[:, t.shape[1] :],
    ):
        moved = {n: layout(t) if t.ndim > 1 else t for n, t in given.items()}
        torch.testing.assert_close(_run(name, moved, backend), expected, rtol=1e-5, atol=1e-5)
    same = {
        n: t[:1].expand(t.shape) if n in SCANS[name].maps and len(t) == 2 else t
        for n, t in given.items()
    }
    wanted = _run(name, {n: t.clone() for n, t in same.items()})
    torch.testing.assert_close(_run(name, same, backend), wanted, rtol=1e-5, atol=1e-5)


@every_scan
@pytest.mark.parametrize("backend", [None, "reference", *EXACT])
@pytest.mark.parametrize("no", ["images", "tokens"])
def test_nothing_to_scan(name: str, backend: str | None, no: str) -> None:
    axis = 0 if no == "images" else SCANS[name].axis
    if axis is None:
        return  # a map has two axes of tokens
    given = _single(name, 9)
    for n in SCANS[name].maps:
        if n != "bonus":
            given[n] = given[n].narrow(axis, 0, 0)
    leaves = {n: t.requires_grad_() for n, t in given.items()}
    out = _run(name, leaves, backend)
    assert out.numel() == 0 and out.ndim == _run(name, _single(name, 9)).ndim
    grads = torch.autograd.grad(out.sum(), list(leaves.values()), materialize_grads=True)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["selective_scan", "cross_selective_scan"])
def test_later_calls_do_the_same(name: str) -> None:
    """Calls of a known layout take a shorter path, which checks nothing again."""
    function = getattr(selective_scan, name)
    given = cast(_single(name, 21), torch.float32)
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


# ---- without what a backend needs --------------------------------------------------------------
@every_scan
def test_without_a_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another backend computes it, and the one that was asked for says why it cannot."""
    scan, tensors = SCANS[name], _single(name)
    expected = _run(name, scan.inputs(33), "reference")
    forget_kernels(monkeypatch)
    missing = build.LibraryState(None, None, "portable", "no C++ compiler found")
    monkeypatch.setitem(build.process.states, scan.library, missing)
    assert difference(_run(name, tensors), expected) < 1e-5
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot.*no C\+\+ compiler found"):
        _run(name, tensors, "cpu")


@every_scan
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="'triton' cannot.*CUDA device, got cpu"):
        _run(name, _single(name), "triton")
    for backend in ("triton", "cpu"):
        with pytest.raises(NotImplementedError, match=f"'{backend}' cannot.*float64"):
            _run(name, cast(_single(name), torch.float64), backend)


def test_states_that_triton_does_not_hold() -> None:
    wide = torch.zeros(1, 1, 1, 257)
    assert "got 257" in linear_attention.triton.unavailable(wide, wide)
    u, rate = torch.zeros(1, 8, 4), torch.zeros(8, 300)
    assert "256 states per channel, got 300" in selective_scan.triton.unavailable(u, rate)


# ---- refusals ----------------------------------------------------------------------------------
GLA, SELECTIVE, MAPS = "gated_linear_attention", "selective_scan", "cross_selective_scan"
REFUSED: list[tuple[str, str, Any, str]] = [
    ("bi_wkv", "segments", 0, "got 0"),
    *(("bi_wkv", "segments", n, f"must be a whole number or None, got {n}") for n in (2.0, True)),
    ("bi_wkv", "value", torch.float64, "torch.float64"),
    *((GLA, n, torch.bfloat16, f"{n} must be torch.float32 for query") for n in ("key", "value")),
    (GLA, "log_gate", torch.float64, "log_gate must be torch.float32"),
    (GLA, "bonus", 1, "bonus must be a tensor or None, got 1"),
    *(
        (SELECTIVE, "B", torch.zeros(2, n, 2, 9), f"groups that divide 8 channels, got {n}")
        for n in (0, 3)
    ),
    (SELECTIVE, "C", torch.zeros(2, 2, 2, 4), r"C must be \(2, 2, 2, 9\)"),
    (SELECTIVE, "delta_bias", torch.float64, "delta_bias must be torch.float32 for"),
    *((name, "backend", "gpu", "triton or None, got 'gpu'") for name in SCANS),
]


@pytest.mark.parametrize(("name", "argument", "value", "said"), REFUSED)
def test_refused(name: str, argument: str, value: Any, said: str) -> None:
    given: dict[str, Any] = {**_single(name, 9), **SCANS[name].options}
    changed = given[argument].to(value) if isinstance(value, torch.dtype) else value
    with pytest.raises(TypeError if "must be a " in said else ValueError, match=said):
        SCANS[name].function(**{**given, argument: changed})


@every_scan
def test_a_wrong_tensor_is_refused_by_its_name(name: str) -> None:
    """Of another size, rank, dtype or device than fits the others."""
    given: dict[str, Any] = {**_single(name, 9), **SCANS[name].options}
    for argument, right in _single(name, 9).items():
        for wrong in (right[1:], right[None], right.long(), right.to("meta"), [0.0]):
            with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b") as refused:
                SCANS[name].function(**{**given, argument: wrong})
            if isinstance(wrong, Tensor) and wrong.shape != right.shape:
                assert str(tuple(wrong.shape)) in str(refused.value)
        if (name, argument) != (GLA, "value"):  # which may have any number of channels
            with pytest.raises(ValueError, match=" must "):
                SCANS[name].function(**{**given, argument: right[..., 1:]})


# ---- graphs ------------------------------------------------------------------------------------
# Those with loops over chunks take longest.
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "cpu") for name in SCANS),
        (SELECTIVE, "chunked"),
        *(pytest.param(n, "chunked", marks=pytest.mark.slow) for n in SCANS if n != SELECTIVE),
    ],
)
def test_compiles_into_one_graph(name: str, backend: str) -> None:
    tensors = {n: t.requires_grad_() for n, t in _single(name, 9).items()}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return _run(name, tensors, backend).square().sum()

    torch._dynamo.reset()
    leaves = list(tensors.values())
    expected = torch.autograd.grad(loss(tensors), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, of in zip(torch.autograd.grad(compiled(tensors), leaves), expected, strict=True):
        torch.testing.assert_close(got, of, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optional", [pytest.param(False, marks=pytest.mark.slow), True])
def test_operators(optional: bool) -> None:
    operators = torch.ops.vision_backbones
    cases: dict[str, tuple[list[Any], tuple[Any, ...]]] = {
        "sequence_scan": (list(_single(SELECTIVE, 9).values()), (True,)),
        "map_scan": (list(_single(MAPS, 12).values()), (True,)),
    }
    cases["map_scan"][0][2] = cases["map_scan"][0][2].mT
    for name, (tensors, options) in cases.items():
        if not optional:
            tensors[-2:] = None, None
        grad = torch.randn_like(tensors[0])
        torch.library.opcheck(getattr(operators, f"{name}_backward"), (grad, *tensors, *options))
        wanted = [t if t is None else t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(getattr(operators, name), (*wanted, *options))
    given = inputs(9, back=optional, bonus=optional, dtype=torch.float32)
    tensors = [t if t is None else t.requires_grad_() for t in given.values()]
    torch.library.opcheck(operators.gated_scan, (*tensors, 0.5))
    detached = [t if t is None else t.detach() for t in tensors[:5]]
    grad = torch.randn_like(detached[2])
    torch.library.opcheck(operators.gated_scan_backward, (grad, *detached, optional, 0.5))


class Layer(nn.Module):
    """A scan of its tensors in their order."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.names = name, list(_single(name, 3))

    def forward(self, *tensors: Tensor) -> Tensor:
        return _run(self.name, dict(zip(self.names, tensors, strict=True)))


def test_exports_for_any_number_of_tokens() -> None:
    any_size = Dim("tokens", min=2, max=4096)
    name, sizes = "bi_wkv in segments", ({1: any_size}, {1: any_size}, None, None)
    example = tuple(wkv_inputs(40).values())
    program = torch.export.export(Layer(name), example, dynamic_shapes=(sizes,))
    for count in (2, 33, 100):
        others = wkv_inputs(count).values()
        torch.testing.assert_close(program.module()(*others), Layer(name)(*others))


# The axes of tokens; those of a map of any size take half a minute.
ANY_SIZE: dict[str, Any] = {
    "bi_wkv in segments": {"key": {1: Dim.DYNAMIC}, "value": {1: Dim.DYNAMIC}},
    GLA: dict.fromkeys(SCANS[GLA].maps[:-1], {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}),
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize(
    ("name", "exported"),
    [(GLA, 12), *(pytest.param(name, 42, marks=pytest.mark.slow) for name in SCANS)],
)
@torch.no_grad()
def test_onnx(name: str, exported: int) -> None:
    """Of one chunk, and of several."""
    tensors, axes = _single(name, exported), ANY_SIZE.get(name)
    shapes = None if axes is None else (tuple(axes.get(n) for n in tensors),)
    layer, example = Layer(name).eval(), tuple(tensors.values())
    program = torch.onnx.export(layer, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for tokens in (exported,) if axes is None else (7, 100):
        tensors = _single(name, tokens)
        fed = zip(session.get_inputs(), tensors.values(), strict=True)
        (out,) = session.run(None, {i.name: t.numpy() for i, t in fed})
        assert difference(torch.from_numpy(out), layer(*tensors.values()).double()) < 1e-5


# ---- Triton, interpreted or on a GPU, and compiled for GPUs ------------------------------------
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.{package}.triton import kernels

for kernel in ({kernels}):
    for flag in (False, True):
        constants = dict({constants}, FOR_BACKWARD=flag, SEGMENTS=flag)
        constants = {{n: v for n, v in constants.items() if n in kernel.arg_names}}
        signature = {{}}
        for name in kernel.arg_names:
            if name.endswith("_ref"):
                signature[name] = ("*fp32", *("i32",) * 4)
            elif name in constants:
                signature[name] = "constexpr"
            else:
                is_count = name in ("batches", "tokens", "heads", "groups", "dim", "length")
                signature[name] = "i32" if is_count else "*fp32"
        if "scale" in signature:
            signature["scale"] = "fp32"
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32))
        assert compiled.asm["ptx"]
"""
COMPILED = {
    "bi_wkv": "BLOCK=kernels._BLOCK",
    "linear_attention": "DIM=32, VALUE_DIM=64, PADDED_DIM=32, BLOCK=64, CHUNK=16, APART=False",
    "selective_scan": "STATES=16, PADDED=16, BLOCK=64, CHUNK=16, SOFTPLUS=True",
}
QUICK = "(bi_wkv or linear and False-False or selective and 6-1-2) and gradients"


def test_triton_kernels(tmp_path: Path) -> None:
    run_cases(FOLDER / "triton_cases.py", tmp_path, "-m", "not slow", "-k", QUICK)


@pytest.mark.slow
def test_triton_kernels_in_all_cases(tmp_path: Path) -> None:
    run_cases(FOLDER / "triton_cases.py", tmp_path, "-m", "slow or not slow")


@pytest.mark.slow
@pytest.mark.parametrize("package", COMPILED)
def test_triton_kernels_compile_ahead_of_time(package: str, tmp_path: Path) -> None:
    under = "_" if package == "bi_wkv" else ""
    kernels = f"kernels.{under}forward_kernel, kernels.{under}backward_kernel"
    constants = COMPILED[package]
    run_code(_COMPILE.format(package=package, kernels=kernels, constants=constants), tmp_path)
