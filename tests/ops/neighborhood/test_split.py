"""The split functions of NATTEN 0.14 to 0.19: meaning, gradients, arguments, compilation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
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
    split_case,
)

from ops import neighborhood
from ops.neighborhood import na1d_qk, na2d, na2d_av, na2d_qk, na3d_av, split_cpu

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_second_derivatives(dtype: torch.dtype) -> None:
    """float32 by the kernels, where a numerical derivative would say little, against float64."""

    def second(dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = {n: t.detach().requires_grad_() for n, t in make_inputs(CASE, dtype).items()}
        attn = our_qk(CASE, tensors).softmax(-1)
        out = our_av(CASE, {**tensors, "weights": attn * tensors["weights"]})
        inputs = list(tensors.values())
        grads = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))

    if dtype == torch.float64:
        small = Case((3, 4), (2, 3), (1, 1), (1, 1), (False, True), dim=2, has_rpb=True)
        tensors = make_inputs(small)
        values = [tensors[name].requires_grad_() for name in ("query", "key", "rpb")]

        def scores(*args: torch.Tensor) -> torch.Tensor:
            out = na2d_qk(args[0], args[1], rpb=args[2], **arguments(small))
            return out.masked_fill(out == -math.inf, 0)

        assert torch.autograd.gradgradcheck(scores, values)
        return
    for got, true in zip(second(dtype), second(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-4 * true.abs().max())


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


def test_names_of_0_14() -> None:
    q, k, v = (torch.randn(1, 2, 8, 9, 4) for _ in range(3))
    rpb = torch.randn(2, 5, 5)
    attn = neighborhood.natten2dqkrpb(q, k, rpb, 3, 2)
    assert torch.equal(attn, na2d_qk(q, k, 3, 2, rpb=rpb))
    assert torch.equal(neighborhood.natten2dqk(q, k, 3, 2), na2d_qk(q, k, 3, 2))
    assert torch.equal(neighborhood.natten2dav(attn, v, 3, 2), na2d_av(attn, v, 3, 2))
    q, k, v = (t[:, :, 0] for t in (q, k, v))
    attn = neighborhood.natten1dqkrpb(q, k, rpb[:, 0], 3, 2)
    assert torch.equal(attn, na1d_qk(q, k, 3, 2, rpb=rpb[:, 0]))
    assert torch.equal(neighborhood.natten1dqk(q, k, 3, 2), na1d_qk(q, k, 3, 2))
    assert torch.equal(neighborhood.natten1dav(attn, v, 3, 2), AV[1](attn, v, 3, 2))


def test_no_bias_and_no_dilation_by_none() -> None:
    q = torch.randn(1, 2, 8, 4)
    assert torch.equal(neighborhood.natten1dqkrpb(q, q, None, 3, None), na1d_qk(q, q, 3))
    assert torch.equal(QK[1](q, q, 3, is_causal=None), na1d_qk(q, q, 3))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 4), (1, 0, 5, 5, 4)])
def test_empty_batch_or_heads(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    attn = na2d_qk(q, q, 3)
    assert attn.shape == (*shape[:-1], 9)
    na2d_av(attn, q, 3).sum().backward()
    assert q.grad is not None
    assert q.grad.shape == shape


def _zeros(*shape: int, **kind: Any) -> torch.Tensor:
    return torch.zeros(shape, **kind)


QUERY = _zeros(1, 2, 6, 7, 4)
BAD_SCORES = {
    "heads last is a rank too few": ({"query": QUERY[0]}, r"query must be .* got \(2, 6, 7, 4\)"),
    "whole numbers": ({"query": QUERY.int()}, r"floating-point .* torch\.int32"),
    "shape of key": ({"key": QUERY[:, :1]}, r"same shape, got \(1, 2, 6, 7, 4\) and \(1, 1, 6"),
    "dtype of key": ({"key": QUERY.half()}, r"key must be torch\.float32"),
    "window larger than the map": ({"kernel_size": 7}, r"7 · 1 = 7 > 6 along axis 0"),
    "kernel of 0": ({"kernel_size": 0}, r"kernel_size .* got 0"),
    "dilation": ({"dilation": 1.5}, r"dilation .* got 1\.5"),
    "shape of rpb": ({"rpb": _zeros(2, 5, 3)}, r"rpb must be .*\(2, 5, 5\), got \(2, 5, 3\)"),
    "additional keys": (
        {"additional_keys": _zeros(1, 5, 2, 4)},
        r"additional_keys must be \(1, 2, any number, 4\), got \(1, 5, 2, 4\)",
    ),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_qk_refuses(name: str) -> None:
    changes, message = BAD_SCORES[name]
    with pytest.raises(ValueError, match=message):
        na2d_qk(**{"query": QUERY, "key": QUERY, "kernel_size": 3, **changes})


def test_av_refuses() -> None:
    with pytest.raises(ValueError, match=r"attn must be \(1, 2, 6, 7, 9\), weights for the 9 keys"):
        na2d_av(_zeros(1, 2, 6, 7, 8), QUERY, 3)
    with pytest.raises(ValueError, match=r"9 keys of a window and 5 additional ones"):
        na2d_av(_zeros(1, 2, 6, 7, 9), QUERY, 3, additional_values=_zeros(1, 2, 5, 4))
    with pytest.raises(TypeError, match="value must be a tensor, got None"):
        na2d_av(_zeros(1, 2, 6, 7, 9), None, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([_zeros(2, 5, 4), _zeros(2, 6, 4)])
    with pytest.raises(ValueError, match="query must not be a nested tensor"):
        na1d_qk(nested, nested, 3)


def test_four_integers_of_0_15_are_refused() -> None:
    """Its 3-D functions had sizes of the first axis apart."""
    value = _zeros(1, 2, 3, 6, 6, 4)
    with pytest.raises(TypeError, match="additional_values must be a tensor, got 1"):
        na3d_av(_zeros(1, 2, 3, 6, 6, 27), value, 3, 3, 1, 1)


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
    assert split_cpu.unavailable(make_inputs(case, dtype)["query"]) is None
    assert_exact(case, which, dtype)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed: int, dtype: torch.dtype) -> None:
    for which in FUNCTIONS:
        assert_exact(split_case(seed, LIMITS), which, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_random_cases(dtype: torch.dtype) -> None:
    for seed in range(1000, 1400):
        for which in FUNCTIONS:
            assert_exact(split_case(seed), which, dtype)


def test_results_do_not_depend_on_threads() -> None:
    case = dataclasses.replace(LARGE[1], size=(64, 64), batch=2)
    tensors = make_inputs(case, torch.float32)
    window = (case.kernel_size, case.dilation, case.is_causal)
    query, key, weights = (tensors[name] for name in ("query", "key", "weights"))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(
            (
                split_cpu.scores(query, key, tensors["rpb"], 0.0, window),
                split_cpu.mix(weights, key, window),
                split_cpu.scatter(weights, query, window),
            )
        )
    torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_half_precision_is_computed_in_float32() -> None:
    """In float16, a sum beyond 2,048 would not change any more by adding ones."""
    weights = torch.ones(1, 1, 3001, 3000, dtype=torch.float16)
    value = torch.ones(1, 1, 3001, 1, dtype=torch.float16)
    out = split_cpu.mix(weights, value, ((3000,), (1,), (False,)))
    assert out.dtype == torch.float16
    assert torch.equal(out, torch.full_like(out, 3000))


def test_values_outside_of_a_window_do_not_matter() -> None:
    """Neither those of keys nor the weights of keys that a causal window lacks."""
    value = torch.zeros(1, 1, 20, 3)
    value[0, 0, 10:] = torch.nan
    weights = torch.ones(1, 1, 20, 5)
    weights[0, 0, 0, 1:] = torch.inf
    out = split_cpu.mix(weights, value, ((5,), (1,), (True,)))
    assert torch.equal(out[0, 0, :10], torch.zeros(10, 3))
    assert out[0, 0, 10:].isnan().all()
