"""The compiled kernels of split neighborhood attention against brute force in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from neighborhood_oracle import Case, Limits
from split_oracle import FUNCTIONS, assert_exact, make_inputs, split_case

from ops.neighborhood import split_cpu, split_tiled

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed: int, dtype: torch.dtype) -> None:
    for which in FUNCTIONS:
        assert_exact(split_case(seed, LIMITS), which, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_random_cases(seed: int) -> None:
    for which in FUNCTIONS:
        for dtype in (torch.float32, torch.bfloat16):
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


def test_kernels_agree_with_torch() -> None:
    case = LARGE[2]
    tensors = make_inputs(dataclasses.replace(case, extra=0), torch.float32)
    window = (case.kernel_size, case.dilation, case.is_causal)
    for module_function in ("mix", "scatter"):
        other = tensors["value"]
        ours = getattr(split_cpu, module_function)(tensors["weights"], other, window)
        plain = getattr(split_tiled, module_function)(tensors["weights"], other, window)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)
