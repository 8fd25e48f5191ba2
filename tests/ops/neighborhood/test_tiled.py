"""The tiled backend against brute force, in every dtype; its operator against torch's checks."""

from __future__ import annotations

import math

import pytest
import torch
from neighborhood_oracle import NA, Case, assert_exact, make_inputs, random_case

from ops.neighborhood import _tiles, na1d, na2d, tiled


@pytest.mark.parametrize("seed", range(200))
def test_random_case(seed: int) -> None:
    assert_exact(random_case(seed), "tiled", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(200, 216))
def test_random_case_in_other_dtypes(seed: int, dtype: torch.dtype) -> None:
    assert_exact(random_case(seed), "tiled", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_many_random_cases(dtype: torch.dtype) -> None:
    for seed in range(216, 1000):
        assert_exact(random_case(seed), "tiled", dtype)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("has_rpb", [False, True])
def test_many_steps(monkeypatch: pytest.MonkeyPatch, return_lse: bool, has_rpb: bool) -> None:
    # One tile a step: the pieces must fit together.
    monkeypatch.setattr(tiled, "_STEP", 1)
    case = Case(
        (21, 18),
        (5, 4),
        (2, 1),
        (2, 1),
        (False, True),
        batch=2,
        heads=4,
        kv_heads=2,
        extra=3,
        has_rpb=has_rpb,
        return_lse=return_lse,
    )
    assert_exact(case, "tiled")


@pytest.mark.parametrize("is_causal", [False, True])
def test_more_keys_in_a_tile_than_torch_takes_at_once(is_causal: bool) -> None:
    # Torch's fused attention goes through the keys in blocks of 512, of which the first may be
    # hidden from a query altogether.
    tensors = torch.randn(3, 1, 1100, 2, 4)
    out, true = (
        na1d(*tensors, 600, is_causal=is_causal, backend=b) for b in ("tiled", "reference")
    )
    torch.testing.assert_close(out, true)


@pytest.mark.parametrize("seed", range(40))
def test_every_query_lies_in_one_tile(seed: int) -> None:
    case = random_case(seed)
    plan = _tiles.tiles_of_map(
        case.size,
        case.kernel_size,
        case.stride,
        case.dilation,
        case.is_causal,
        torch.device("cpu"),
    )
    queries = torch.cat([tiles.queries.flatten() for tiles in plan])
    assert queries.sort().values.tolist() == list(range(math.prod(case.size)))
    for tiles in plan:
        assert tiles.visible.any(0).all(), "a key that no query of its tile sees"
        assert tiles.visible.any(1).all(), "a query that sees no key"


def _operator_arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple:
    inputs = make_inputs(case, dtype).map(lambda t: t.detach().requires_grad_())
    return (
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.additional_keys,
        inputs.additional_values,
        inputs.rpb,
        list(case.kernel_size),
        list(case.stride),
        list(case.dilation),
        list(case.is_causal),
        0.3,
        case.return_lse,
    )


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool, return_lse: bool) -> None:
    case = Case(
        (5, 6),
        (3, 2),
        (1, 2),
        (1, 2),
        (True, False),
        batch=2,
        heads=2,
        kv_heads=1 if full else 2,
        value_dim=5 if full else 8,
        extra=2 if full else 0,
        has_rpb=full,
        return_lse=return_lse,
    )
    torch.library.opcheck(tiled._forward, _operator_arguments(case))


@pytest.mark.parametrize("seed", [1, 3, 17, 56])
def test_gradcheck(seed: int) -> None:
    case = random_case(seed)
    case = Case(
        tuple(min(n, 5) for n in case.size),
        tuple(min(k, 3, n) for k, n in zip(case.kernel_size, case.size, strict=True)),
        (1,) * case.rank,
        (1,) * case.rank,
        case.is_causal,
        dim=2,
        value_dim=3,
        extra=2,
        has_rpb=True,
        heads=2,
    )
    inputs = make_inputs(case).map(lambda t: t.detach().requires_grad_()).present()

    def attention(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        return NA[case.rank](**named, **case.arguments, return_lse=True, backend="tiled")

    assert torch.autograd.gradcheck(attention, tuple(inputs.values()), fast_mode=True)


def test_second_gradients_are_refused() -> None:
    query = torch.randn(1, 6, 1, 4, requires_grad=True)
    out = na1d(query, query, query, 3, backend="tiled")
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def _peak_of_temporaries(size: int, kernel_size: int) -> int:
    """Largest number of bytes that one forward and backward hold at once beyond its tensors."""
    tensors = [torch.randn(1, size, size, 2, 16, requires_grad=True) for _ in range(3)]

    def step() -> None:
        out = na2d(*tensors, kernel_size, backend="tiled")
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_memory_does_not_grow_with_the_window() -> None:
    small, large = _peak_of_temporaries(64, 5), _peak_of_temporaries(64, 25)
    assert large < 1.5 * small, (small, large)
