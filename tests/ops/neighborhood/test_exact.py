"""Every backend against brute force in float64: random calls, corners, unusual numbers, figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from compiled_kernels import compiled_for
from neighborhood_oracle import (
    UNUSUAL_SCORES,
    Case,
    Limits,
    assert_exact,
    assert_lse_of_unusual_scores,
    random_case,
)

from ops.cpu import build, instruction_sets
from ops.neighborhood import _tiles, na1d, na2d

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ANY = Limits()
DIMS = Limits(dims=(1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 48, 64, 80, 127, 128))
# Maps wide enough for every way of fetching keys: whole vectors, permuted ones, gathered ones.
WIDE = Limits(max_size={1: 200, 2: 26, 3: 9}, dims=(1, 7, 16, 20, 32))


class Sweep(NamedTuple):
    """Random calls of a backend, by the seeds of the quick and of the slow tests."""

    backend: str
    dtype: torch.dtype
    limits: Limits
    quick: range
    slow: range


SWEEPS = [
    Sweep("reference", F64, ANY, range(60), range(60, 500)),
    *(Sweep("reference", dtype, ANY, range(0), range(500)) for dtype in (F32, BF16, F16)),
    Sweep("tiled", F32, ANY, range(200), range(216, 1000)),
    *(Sweep("tiled", dtype, ANY, range(200, 216), range(216, 1000)) for dtype in (F64, BF16, F16)),
    Sweep("cpu", F32, DIMS, range(60), range(3000, 3600)),
    Sweep("cpu", F32, WIDE, range(1000, 1012), range(4000, 4150)),
    Sweep("cpu", BF16, DIMS, range(2000, 2015), range(5000, 5100)),
]


@pytest.mark.parametrize(
    ("sweep", "seeds"),
    [
        *((sweep, [seed]) for sweep in SWEEPS for seed in sweep.quick),
        *(pytest.param(sweep, sweep.slow, marks=pytest.mark.slow) for sweep in SWEEPS),
    ],
    ids=lambda value: f"{value.backend}-{value.dtype}" if hasattr(value, "dtype") else str(value),
)
def test_random_calls(sweep: Sweep, seeds: Sequence[int]) -> None:
    for seed in seeds:
        assert_exact(random_case(seed, sweep.limits), sweep.backend, sweep.dtype)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_instruction_sets(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plainer builds of the kernel, which this CPU would not choose, are exact too."""
    if isa not in instruction_sets.candidates()[1:]:
        return  # the other tests ran on it
    compiled_for(isa, monkeypatch)
    assert build.status("neighborhood").instruction_set == isa
    for seeds, limits in ((range(40), ANY), (range(1000, 1006), WIDE)):
        for seed in seeds:
            assert_exact(random_case(seed, limits), "cpu")


# ---- corners -----------------------------------------------------------------------------------
ONES, NOT_CAUSAL = (1, 1), (False, False)
EDGES = {
    "axis of length 1": Case((1, 9), (1, 3), ONES, ONES, NOT_CAUSAL),
    "all causal": Case((7, 6), (4, 3), (2, 1), (1, 2), (True, True)),
    "windows of a stride": Case((9, 9), (5, 5), (5, 5), ONES, NOT_CAUSAL),
    "window wider than a tile": Case((40, 5), (35, 5), ONES, ONES, NOT_CAUSAL),
    "many additional keys": Case((6, 5), (3, 3), ONES, ONES, NOT_CAUSAL, extra=70),
}
# Of the blocks, chunks and segments of the compiled kernel.
LARGE = {
    "many blocks in a row": Case((300,), (200,), (1,), (1,), (False,)),
    "many causal blocks": Case((300,), (150,), (7,), (2,), (True,)),
    "many blocks": Case((20, 20), (19, 17), ONES, ONES, NOT_CAUSAL, extra=300),
    "far dilation": Case((5, 300), (1, 3), ONES, (1, 100), NOT_CAUSAL),
    "last axis of one": Case((40, 1), (5, 1), ONES, ONES, NOT_CAUSAL),
    "first axis of one, even kernel": Case((1, 40), (1, 4), ONES, ONES, NOT_CAUSAL),
    "largest dim": Case((17, 17), (17, 17), ONES, ONES, NOT_CAUSAL, dim=512, value_dim=1),
    "n mod d": Case((30, 30), (7, 7), ONES, (4, 4), (False, True), has_rpb=True),
    "several chunks": Case(
        (60, 34), (7, 7), ONES, ONES, NOT_CAUSAL, heads=2, kv_heads=2, dim=64, has_rpb=True
    ),
    "several segments": Case(
        *((1500,), (63,), (1,), (1,), (False,)),
        **{"heads": 2, "kv_heads": 2, "dim": 80, "value_dim": 64, "has_rpb": True},
    ),
    "gathered bias": Case((60,), (40,), (1,), (1,), (False,), has_rpb=True, extra=2),
    # Neighbouring windows: every column in more lanes than the last, and in two blocks.
    **{
        f"{kernel} neighbours, dim {dim}": Case(
            *((200,), (kernel,), (1,), (1,), (causal,)), heads=2, dim=dim, value_dim=dim
        )
        for kernel, causal in ((63, False), (16, True), (150, False))
        for dim in (16, 20, 24)
    },
    # Windows narrower than the lanes, stairs of query rows, and rows in two parts.
    **{
        f"{kernel} in a map, dim {dim}": Case(
            *(size, kernel, ONES, ONES, (causal, False)), heads=2, dim=dim, value_dim=dim
        )
        for size, kernel, causal in (
            *[((30, 40), (1, 15), False), ((30, 40), (1, 21), False), ((31, 20), (2, 5), False)],
            *[((31, 20), (3, 5), False), ((31, 20), (13, 5), False), ((41, 20), (25, 3), True)],
        )
        for dim in (16, 20, 24)
    },
}


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", F64), ("tiled", F64), (None, F32)], ids=str
)
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("has_rpb", [False, True])
def test_edges(backend: str | None, dtype: torch.dtype, name: str, has_rpb: bool) -> None:
    case = Case(**{**vars(EDGES[name]), "has_rpb": has_rpb, "heads": 2, "batch": 2})
    assert_exact(case, backend, dtype)


@pytest.mark.parametrize("name", LARGE)
def test_large_calls_of_the_kernel(name: str) -> None:
    assert_exact(LARGE[name], "cpu")


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("has_rpb", [False, True])
def test_tiles_fit_together(
    monkeypatch: pytest.MonkeyPatch, return_lse: bool, has_rpb: bool
) -> None:
    monkeypatch.setattr(_tiles, "_STEP", 1)  # tile a step
    more = {"extra": 3, "has_rpb": has_rpb, "return_lse": return_lse}
    window = ((5, 4), (2, 1), (2, 1), (False, True))
    assert_exact(Case((21, 18), *window, batch=2, heads=4, kv_heads=2, **more), "tiled")


@pytest.mark.parametrize("is_causal", [False, True])
def test_more_keys_in_a_tile_than_torch_takes_at_once(is_causal: bool) -> None:
    # Torch's fused attention goes through the keys in blocks of 512, of which the first may be
    # hidden from a query altogether.
    tensors = torch.randn(3, 1, 1100, 2, 4)
    out, true = (
        na1d(*tensors, 600, is_causal=is_causal, backend=b) for b in ("tiled", "reference")
    )
    torch.testing.assert_close(out, true)


# ---- unusual numbers and empty calls -------------------------------------------------------------
# None is what a user gets: on the CPU the compiled kernel, or tiled where there is no compiler.
BACKENDS = ("reference", "tiled", None)
DTYPE = {"reference": torch.float64, "tiled": torch.float64, None: torch.float32}

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("kind", UNUSUAL_SCORES)
@pytest.mark.parametrize("backend", ["reference", "tiled", "cpu"])
def test_lse_of_unusual_scores(backend: str, kind: str) -> None:
    assert_lse_of_unusual_scores(kind, backend)


@every_backend
@pytest.mark.parametrize("return_lse", [False, True])
def test_huge_logits(backend: str | None, return_lse: bool) -> None:
    query, key, value = (torch.randn(1, 9, 9, 2, 8).requires_grad_() for _ in range(3))
    result = na2d(query, key, value, 3, scale=1e4, return_lse=return_lse, backend=backend)
    out = result[0] if return_lse else result
    true, true_lse = na2d(
        *(t.double() for t in (query, key, value)),
        3,
        scale=1e4,
        return_lse=True,
        backend="reference",
    )
    torch.testing.assert_close(out.double(), true, rtol=1e-2, atol=1e-2)
    if return_lse:
        torch.testing.assert_close(result[1].double(), true_lse, rtol=1e-5, atol=1e-2)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)


@every_backend
def test_empty_batch(backend: str | None) -> None:
    tensors = [torch.empty(0, 5, 6, 2, 4, requires_grad=True) for _ in range(3)]
    out, lse = na2d(*tensors, 3, return_lse=True, backend=backend)
    assert out.shape == (0, 5, 6, 2, 4)
    assert lse.shape == (0, 5, 6, 2)
    grads = torch.autograd.grad(out.sum() + lse.sum(), tensors)
    assert all(grad.shape == tensor.shape for grad, tensor in zip(grads, tensors, strict=True))


@every_backend
def test_no_additional_keys_are_none(backend: str | None) -> None:
    tensors = [torch.randn(2, 7, 2, 4) for _ in range(3)]
    nothing = torch.empty(2, 0, 2, 4)
    out = na1d(*tensors, 3, additional_keys=nothing, additional_values=nothing, backend=backend)
    assert out.equal(na1d(*tensors, 3, backend=backend))
