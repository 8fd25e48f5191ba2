"""The Triton kernels of neighborhood attention against brute force in float64.

pytest does not collect this file by its name. Without a GPU, Triton must be told to interpret the
kernels before anything imports it, so ``test_triton.py`` runs this file in a process of its own.
On a GPU, run all of it, autotuned, by::

    python -m pytest tests/ops/neighborhood/triton_cases.py -m "slow or not slow"
"""

from __future__ import annotations

import dataclasses
import itertools
import os

import neighborhood_oracle as oracle
import pytest
import split_oracle
import torch
import triton
from torch import Tensor
from triton_interpreter import quick_interpreter

from ops.neighborhood import split
from ops.neighborhood import triton as backend
from ops.neighborhood._geometry import Inputs, NAParams
from ops.neighborhood.triton import launch, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# The interpreter takes milliseconds for each block of each tile: maps must be small there.
LIMITS = (
    oracle.Limits()
    if DEVICE == "cuda"
    else oracle.Limits(max_size={1: 40, 2: 10, 3: 5}, dims=(1, 2, 3, 7, 8, 16, 17, 24, 32, 48, 128))
)

# "i/n": of the slow cases, every n-th from i on, so that several processes can share them.
PART, PARTS = map(int, os.environ.get("TRITON_CASES_PART", "0/1").split("/"))

pytestmark = pytest.mark.filterwarnings(
    # Triton 3.7 imports a module that Python 3.12 and later warn about.
    "ignore::DeprecationWarning:triton"
)


SLOW = pytest.mark.slow


@pytest.fixture(scope="session", autouse=True)
def quickly():
    with quick_interpreter(), pytest.MonkeyPatch.context() as patch:
        if triton.knobs.runtime.interpret:
            patch.setattr(launch, "_PROGRAMS", 6)  # there is no GPU to fill
        patch.setattr(split, "_backend", lambda tensor: launch)
        yield


def small(seed: int) -> oracle.Case:
    """A random case, with fewer heads and images than usual where it must be interpreted."""
    case = oracle.random_case(seed, LIMITS)
    if DEVICE == "cuda":
        return case
    group = case.heads // case.kv_heads
    kv_heads = 1 if case.batch > 1 or group > 1 else min(case.kv_heads, 2)
    return dataclasses.replace(
        case, batch=min(case.batch, 2), kv_heads=kv_heads, heads=kv_heads * min(group, 2)
    )


def check(case: oracle.Case, dtype: torch.dtype = torch.float32, gradients: bool = True) -> None:
    oracle.assert_exact(case, "triton", dtype, DEVICE, gradients)


# A case of each kind: bias, additional keys, groups, strides, causal axes, unequal groups.
PLAIN = oracle.Case((5, 6), (5, 3), (1, 1), (1, 1), (False, False), batch=2, heads=2, kv_heads=2)
_WINDOWS = ((5, 6), (2, 4), (2, 1), (2, 1), (False, True))
RICH = oracle.Case(*_WINDOWS, heads=2, dim=7, value_dim=20, extra=3, has_rpb=True, packed=True)
# All of that on a map as small as tests that call it many times need it.
TINY = dataclasses.replace(
    RICH, size=(4,), kernel_size=(3,), stride=(2,), dilation=(1,), is_causal=(True,)
)
# Windows so wide that some blocks lie within all the windows of the smallest tiles.
WIDE = [
    oracle.Case((64,), (47,), (1,), (1,), (False,), has_rpb=True),
    oracle.Case((64,), (47,), (1,), (1,), (True,)),
    oracle.Case((12, 14), (8, 7), (1, 1), (1, 1), (False, False)),
    oracle.Case((16, 8), (8, 8), (8, 8), (1, 1), (False, False)),
    oracle.Case((4, 3, 8), (3, 3, 7), (1, 1, 1), (1, 1, 1), (False, False, False)),
    # The last tile reaches beyond the axis, where the bias has no entries.
    oracle.Case((57,), (47,), (1,), (1,), (False,), has_rpb=True),
]
HALF = [PLAIN, RICH, WIDE[0], WIDE[2], WIDE[4]]


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(n, marks=SLOW) for n in range(3, 520)[PART::PARTS])]
)
def test_random_cases_are_exact(seed):
    check(small(seed))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (RICH, BF16),
        *(pytest.param(*more, marks=SLOW) for more in itertools.product(HALF, (BF16, F16))),
    ],
)
def test_half_precision(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind == "nan key" else pytest.param(kind, marks=SLOW)
        for kind in oracle.UNUSUAL_SCORES
    ],
)
@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of the interpreter's NumPy, about infinities
def test_lse_of_unusual_scores(kind):
    oracle.assert_lse_of_unusual_scores(kind, "triton", DEVICE)


@pytest.mark.parametrize(
    "case",
    [WIDE[0], *(pytest.param(c, marks=SLOW) for c in WIDE[1:])],
    ids=lambda case: f"{case.rank}d-{case.kernel_size}",
)
def test_blocks_without_a_mask(case):
    check(case)


def run(case: oracle.Case, inputs: oracle.Inputs) -> tuple[Tensor, Tensor]:
    scale = case.dim**-0.5 if case.scale is None else case.scale
    params = NAParams(case.kernel_size, case.stride, case.dilation, case.is_causal, scale)
    return backend.attend(Inputs(**vars(inputs)), params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "index"),
    [(rank, i) for rank in (1, 2, 3) for i in range(len(tiles.configs(rank)))][PART::PARTS],
)
def test_every_tile_that_tuning_tries_is_exact(rank, index, monkeypatch):
    monkeypatch.setattr(launch, "_fixed", lambda arguments: tiles.configs(rank)[index])
    sizes, kernels = {1: (150,), 2: (11, 18), 3: (5, 6, 9)}, {1: (90,), 2: (5, 9), 3: (3, 4, 5)}
    for causal, dilation, rpb in ((False, 1, True), (True, 1, False), (False, 0, False)):
        case = oracle.Case(
            sizes[rank],
            kernels[rank],
            (1,) * rank,
            tuple(dilation or n // k for n, k in zip(sizes[rank], kernels[rank], strict=True)),
            (causal,) * rank,
            has_rpb=rpb,
        )
        check(case)


def loss(out: Tensor, lse: Tensor) -> Tensor:
    return (out * out).sum() + lse.sum()


def results_of_rich() -> dict[str, Tensor]:
    """The output, the lse, and the gradients of their loss by the name of the input."""
    inputs = oracle.make_inputs(RICH, torch.float32, DEVICE).map(lambda t: t.requires_grad_())
    out, lse = run(RICH, inputs)
    present = inputs.present()
    found = torch.autograd.grad(loss(out, lse), list(present.values()))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(present, found, strict=True))}


@pytest.fixture(scope="module")
def rich():
    return results_of_rich()


@pytest.mark.parametrize("which", ["query", "key", "additional_keys", "rpb"])
def test_gradients_of_some_inputs_alone(which, rich):
    inputs = oracle.make_inputs(RICH, torch.float32, DEVICE)
    getattr(inputs, which).requires_grad_()
    out, lse = run(RICH, inputs)
    loss(out, lse).backward()
    assert torch.equal(getattr(inputs, which).grad, rich[which])
    others = [t for name, t in inputs.present().items() if name != which]
    assert all(t.grad is None for t in others)


def test_gradient_through_lse_alone():
    inputs = oracle.make_inputs(RICH, torch.float32, DEVICE).map(lambda t: t.requires_grad_())
    true = inputs.map(lambda t: t.detach().double().requires_grad_())
    lse, true_lse = run(RICH, inputs)[1], oracle.brute_force(RICH, true)[1]
    names = ("query", "key", "additional_keys", "rpb")
    got = torch.autograd.grad(lse.square().sum(), [getattr(inputs, n) for n in names])
    expected = torch.autograd.grad(true_lse.square().sum(), [getattr(true, n) for n in names])
    for name, a, b in zip(names, got, expected, strict=True):
        assert oracle.error(a, b) <= 2e-5, name


@pytest.mark.slow
def test_repeated_runs_are_bitwise_equal(rich):
    again = results_of_rich()
    assert list(again) == list(rich)
    assert all(torch.equal(again[name], result) for name, result in rich.items())


def test_huge_logits():
    """Whole numbers, so that the logits are exact: one key wins, or several in equal parts."""
    inputs = oracle.make_inputs(PLAIN, torch.float32, DEVICE).map(lambda t: t.mul(3).round())
    case = dataclasses.replace(PLAIN, scale=1024.0)
    out, lse = run(case, inputs)
    true_out, true_lse = oracle.brute_force(case, inputs.map(Tensor.double))
    assert oracle.error(out, true_out) <= 1e-6
    assert oracle.error(lse, true_lse) <= 1e-6


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            dataclasses.replace(
                PLAIN, batch=1, heads=1, kv_heads=1, size=(4, 3), kernel_size=(3, 2)
            ),
            marks=SLOW,
        ),
        TINY,
    ],
    ids=["plain", "rich"],
)
def test_opcheck(case):
    """Calls it some ten times: small maps."""
    inputs = oracle.make_inputs(case, torch.float32, DEVICE).map(lambda t: t.requires_grad_())
    tensors = tuple(vars(inputs).values())
    windows = (case.kernel_size, case.stride, case.dilation, case.is_causal)
    parameters = (*map(list, windows), 0.3)
    torch.library.opcheck(backend._attend, (*tensors, *parameters))
    detached = [None if t is None else t.detach() for t in tensors]
    out, lse = backend._attend(*detached, *parameters)
    needed = [t is not None for t in tensors]
    torch.library.opcheck(
        torch.ops.vision_backbones.triton_neighborhood_backward,
        (torch.randn_like(out), torch.randn_like(lse), out, lse, *detached, *parameters, needed),
    )


def test_compiles_into_one_graph():
    inputs = oracle.make_inputs(TINY, torch.float32, DEVICE).map(lambda t: t.requires_grad_())

    def squares() -> Tensor:
        attention = oracle.NA[TINY.rank](**inputs.present(), **TINY.arguments, backend="triton")
        return attention.square().sum()

    expected = torch.autograd.grad(squares(), list(inputs.present().values()))
    compiled = torch.compile(squares, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(), list(inputs.present().values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- scores and sums alone -----------------------------------------------------------------------
# Dilated and causal axes, a bias, additional keys, strided tensors.
SPLIT = dataclasses.replace(RICH, stride=(1, 1), value_dim=8)
DEEP = oracle.Case(
    *((3, 4, 5), (2, 3, 2), (1, 1, 1), (1, 1, 2), (True, False, False)), dim=3, has_rpb=True
)
LONG = oracle.Case((40,), (7,), (1,), (3,), (False,), dim=17, has_rpb=True)
QUICK = [(SPLIT, F32), (SPLIT, BF16), (DEEP, F32), (LONG, F32)]
MORE = [(SPLIT, F16), *((case, dtype) for case in (DEEP, LONG) for dtype in (BF16, F16))]


def check_split(case: oracle.Case, which: str, dtype: torch.dtype) -> None:
    query = split_oracle.make_inputs(case, dtype)["query"].to(DEVICE).movedim(1, -2)
    assert backend.unavailable(Inputs(query, query, query)) is None
    split_oracle.assert_exact(case, which, dtype, DEVICE)


@pytest.mark.parametrize(
    ("case", "dtype"), [*QUICK, *(pytest.param(*more, marks=SLOW) for more in MORE)]
)
@pytest.mark.parametrize("which", split_oracle.FUNCTIONS)
def test_split_cases(which, case, dtype):
    check_split(case, which, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60 if DEVICE == "cuda" else 12)[PART::PARTS])
def test_random_split_cases(seed):
    limits = dataclasses.replace(LIMITS, grouped=False, value_dim_differs=False)
    if DEVICE == "cpu":
        limits = dataclasses.replace(limits, max_size={1: 40, 2: 9, 3: 4}, dims=(1, 3, 8, 17))
    case = split_oracle.split_case(seed, limits)
    for which in split_oracle.FUNCTIONS:
        check_split(
            dataclasses.replace(case, batch=1 if DEVICE == "cpu" else case.batch), which, F32
        )


# Its formula is that of the CPU's functions, whose test is quick.
@pytest.mark.slow
def test_second_derivatives_of_split():
    got = split_oracle.second_derivatives(SPLIT, F32, DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_backend", lambda tensor: split.split_tiled)
        true = split_oracle.second_derivatives(SPLIT, torch.float64)
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
