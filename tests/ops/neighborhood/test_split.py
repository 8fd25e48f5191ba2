"""The split functions of NATTEN 0.14 to 0.19: meaning, gradients, arguments, compilation."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from compiled_kernels import using_threads
from neighborhood_oracle import Case, Limits
from split_oracle import (
    AV,
    FUNCTIONS,
    QK,
    arguments,
    assert_exact,
    make_inputs,
    our_av,
    our_qk,
    second_derivatives,
    split_case,
)

from ops import neighborhood
from ops.neighborhood import cpu, na2d, na2d_av, na2d_qk, split

CASE = Case((5, 7), (3, 4), (1, 1), (1, 1), (False, True), heads=2, dim=3, extra=2, has_rpb=True)


def test_softmax_between_makes_the_fused_attention() -> None:
    """The layouts differ: the fused function takes heads before channels."""
    case = Case(**{**vars(CASE), "batch": 2})
    tensors = make_inputs(case)
    attn = our_qk(case, tensors).softmax(-1)
    out = our_av(case, {**tensors, "weights": attn})
    heads_last = {
        name: tensors[name].movedim(1, -2)
        for name in ("query", "key", "value", "additional_keys", "additional_values")
    }
    fused = na2d(**heads_last, rpb=tensors["rpb"], scale=1.0, **arguments(case))
    torch.testing.assert_close(out.movedim(1, -2), fused)


def test_second_derivatives() -> None:
    """float32 by the kernels, where a numerical derivative would say little, against float64."""
    exact = second_derivatives(CASE, torch.float64)
    for got, true in zip(second_derivatives(CASE, torch.float32), exact, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-4 * true.abs().max())
    small = Case((3, 4), (2, 3), (1, 1), (1, 1), (False, True), dim=2, has_rpb=True)
    tensors = make_inputs(small)
    values = [tensors[name].requires_grad_() for name in ("query", "key", "rpb")]

    def scores(query: torch.Tensor, key: torch.Tensor, rpb: torch.Tensor) -> torch.Tensor:
        out = na2d_qk(query, key, rpb=rpb, **arguments(small))
        return out.masked_fill(out == -math.inf, 0)

    assert torch.autograd.gradgradcheck(scores, values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiles_into_one_graph(dtype: torch.dtype) -> None:
    tensors = {n: t.detach().requires_grad_() for n, t in make_inputs(CASE, dtype).items()}

    def loss() -> torch.Tensor:
        attn = our_qk(CASE, tensors).softmax(-1)
        return our_av(CASE, {**tensors, "weights": attn}).square().sum()

    inputs = [t for n, t in tensors.items() if n != "weights"]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(), inputs)
    for a, b in zip(got, torch.autograd.grad(loss(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_exports_for_any_size() -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            attn = na2d_qk(query, query, 3, (2, 1), is_causal=(False, True)).softmax(-1)
            return na2d_av(attn, value, 3, (2, 1), is_causal=(False, True))

    def inputs(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(1, 2, *size, 4), torch.randn(1, 2, *size, 4)

    dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Attention(), inputs(9, 7), dynamic_shapes=(dynamic, dynamic))
    other = inputs(6, 12)
    torch.testing.assert_close(program.module()(*other), Attention()(*other))


def test_weights_take_the_dtype_of_values() -> None:
    """As after a softmax in float32 under autocast."""
    attn, value = torch.randn(1, 2, 6, 6, 9), torch.randn(1, 2, 6, 6, 4).half()
    out = na2d_av(attn, value, 3)
    assert out.dtype == torch.float16
    assert torch.equal(out, na2d_av(attn.half(), value, 3))


@pytest.mark.parametrize("rank", [1, 2])
def test_names_of_0_14(rank: int) -> None:
    q, k, v = torch.randn(3, 1, 2, *(8, 9)[:rank], 4)
    rpb, (qk, qkrpb, av) = (
        torch.randn(2, *(5, 5)[:rank]),
        (getattr(neighborhood, f"natten{rank}d{name}") for name in ("qk", "qkrpb", "av")),
    )
    attn = qkrpb(q, k, rpb, 3, 2)
    assert torch.equal(attn, QK[rank](q, k, 3, 2, rpb=rpb))
    assert torch.equal(qk(q, k, 3, 2), QK[rank](q, k, 3, 2))
    assert torch.equal(av(attn, v, 3, 2), AV[rank](attn, v, 3, 2))
    assert torch.equal(qkrpb(q, q, None, 3, None), QK[rank](q, q, 3, is_causal=None))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 4), (1, 0, 5, 5, 4)])
def test_empty_batch_or_heads(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    attn = na2d_qk(q, q, 3)
    assert attn.shape == (*shape[:-1], 9)
    na2d_av(attn, q, 3).sum().backward()
    assert q.grad is not None
    assert q.grad.shape == shape


# ---- compiled kernels ----------------------------------------------------------------------------
LIMITS = Limits(max_size={1: 60, 2: 20, 3: 7}, grouped=False, value_dim_differs=False)

# Several tiles, blocks of keys and lane groups; windows cut by causality; channels left over.
LARGE = [
    Case((300,), (131,), (1,), (2,), (False,), dim=5),
    Case((40, 33), (7, 7), (1, 1), (1, 1), (False, False), heads=2, dim=32, has_rpb=True),
    Case((17, 50), (5, 13), (1, 1), (3, 2), (True, False), dim=20, extra=2),
    Case((18, 19), (13, 11), (1, 1), (1, 1), (False, True), heads=2, dim=8),
    Case((6, 9, 20), (3, 4, 5), (1, 1, 1), (2, 1, 3), (True, False, True), dim=17),
]


@pytest.mark.parametrize("which", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: "x".join(map(str, case.size)))
def test_large_maps(case: Case, dtype: torch.dtype, which: str) -> None:
    assert split._backend(make_inputs(case, dtype)["query"]) is cpu
    assert_exact(case, which, dtype)


SLOW = pytest.mark.slow
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "seeds",
    [*(range(n, n + 4) for n in range(0, 40, 4)), pytest.param(range(1000, 1400), marks=SLOW)],
    ids=str,
)
def test_random_cases(seeds: range, dtype: torch.dtype) -> None:
    for seed, which in itertools.product(seeds, FUNCTIONS):
        assert_exact(split_case(seed, LIMITS if seed < 1000 else None), which, dtype)


def test_results_do_not_depend_on_threads() -> None:
    case = dataclasses.replace(LARGE[1], size=(64, 64), batch=2)
    tensors = make_inputs(case, torch.float32)
    window = (case.kernel_size, case.dilation, case.is_causal)
    query, key, weights = (tensors[name] for name in ("query", "key", "weights"))
    results = []
    for threads in (1, 3):
        with using_threads(threads):
            scores = cpu.scores(query, key, tensors["rpb"], 0.0, window)
            sums = cpu.mix(weights, key, window), cpu.scatter(weights, query, window)
            results.append((scores, *sums))
    assert all(map(torch.equal, *results))


def test_half_precision_is_computed_in_float32() -> None:
    """In float16, a sum beyond 2,048 would not change any more by adding ones."""
    weights = torch.ones(1, 1, 3001, 3000, dtype=torch.float16)
    value = torch.ones(1, 1, 3001, 1, dtype=torch.float16)
    out = cpu.mix(weights, value, ((3000,), (1,), (False,)))
    assert out.dtype == torch.float16
    assert torch.equal(out, torch.full_like(out, 3000))


def test_values_outside_of_a_window_do_not_matter() -> None:
    """Neither those of keys nor the weights of keys that a causal window lacks."""
    value = torch.zeros(1, 1, 20, 3)
    value[0, 0, 10:] = torch.nan
    weights = torch.ones(1, 1, 20, 5)
    weights[0, 0, 0, 1:] = torch.inf
    out = cpu.mix(weights, value, ((5,), (1,), (True,)))
    assert torch.equal(out[0, 0, :10], torch.zeros(10, 3))
    assert out[0, 0, 10:].isnan().all()
