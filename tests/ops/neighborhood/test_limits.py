"""Scores that are not finite or huge, and calls without images or additional keys, by backends."""

from __future__ import annotations

import pytest
import torch
from neighborhood_oracle import (
    UNUSUAL_SCORES,
    assert_lse_of_unusual_scores,
)

from ops.neighborhood import na1d, na2d

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
