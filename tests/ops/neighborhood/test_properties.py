"""Invariants of neighborhood attention that hold for every backend, and edge cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhood_oracle import (
    NA,
    UNUSUAL_SCORES,
    Case,
    assert_lse_of_unusual_scores,
    make_inputs,
)
from torch import Tensor

from ops.neighborhood import na1d, na2d

# None is what a user gets: on the CPU the compiled kernel, or tiled where there is no compiler.
BACKENDS = ("reference", "tiled", None)
DTYPE = {"reference": torch.float64, "tiled": torch.float64, None: torch.float32}

every_backend = pytest.mark.parametrize("backend", BACKENDS)
some_examples = settings(max_examples=20, deadline=None, derandomize=True, database=None)


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    """A small call; ``fixed`` overrides fields of the case."""
    rank = draw(st.integers(1, 3))
    axes = []
    for _ in range(rank):
        n = draw(st.integers(1, {1: 40, 2: 10, 3: 5}[rank]))
        k = draw(st.integers(1, n))
        s = draw(st.integers(1, k))
        d = draw(st.integers(1, n // k))
        axes.append((n, k, s, d, draw(st.booleans())))
    size, kernel_size, stride, dilation, is_causal = (tuple(a) for a in zip(*axes, strict=True))
    values = {
        "size": size,
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
        "is_causal": is_causal,
        "batch": draw(st.integers(1, 3)),
        "heads": 2,
        "kv_heads": draw(st.integers(1, 2)),
        "dim": draw(st.integers(1, 20)),
        "value_dim": draw(st.integers(1, 20)),
        "has_rpb": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }
    return Case(**{**values, **fixed})


def attend(case: Case, tensors: dict[str, Tensor], backend: str | None, **more: object) -> Tensor:
    return NA[case.rank](**tensors, **{**case.arguments, "backend": backend, **more})


@every_backend
@some_examples
@given(case=cases())
def test_constant_values_are_preserved(backend: str | None, case: Case) -> None:
    tensors = make_inputs(case, DTYPE[backend]).present()
    row = torch.arange(case.value_dim, dtype=DTYPE[backend]) - 3
    tensors["value"] = row.expand_as(tensors["value"])
    out = attend(case, tensors, backend)
    torch.testing.assert_close(out, row.expand_as(out))


@every_backend
@some_examples
@given(case=cases(), data=st.data())
def test_batch_and_heads_are_separate(backend: str | None, case: Case, data: st.DataObject) -> None:
    tensors = make_inputs(case, DTYPE[backend]).present()
    out, lse = attend(case, tensors, backend, return_lse=True)
    batch = torch.tensor(data.draw(st.permutations(range(case.batch))))
    # Heads in groups, since one key head serves several query heads.
    swapped = {
        name: tensor.flip(0) if name == "rpb" else tensor.flip(-2)[batch]
        for name, tensor in tensors.items()
    }
    out_swapped, lse_swapped = attend(case, swapped, backend, return_lse=True)
    torch.testing.assert_close(out_swapped, out.flip(-2)[batch])
    torch.testing.assert_close(lse_swapped, lse.flip(-1)[batch])


@pytest.mark.parametrize("kind", UNUSUAL_SCORES)
@pytest.mark.parametrize("backend", ["reference", "tiled", "cpu"])
def test_lse_of_unusual_scores(backend: str, kind: str) -> None:
    assert_lse_of_unusual_scores(kind, backend)


@every_backend
@some_examples
@given(case=cases(), extra=st.integers(1, 5))
def test_lse_merges_with_additional_keys(backend: str | None, case: Case, extra: int) -> None:
    case = Case(**{**vars(case), "extra": extra})
    tensors = make_inputs(case, DTYPE[backend]).present()
    together, lse_together = attend(case, tensors, backend, return_lse=True)
    extra_keys, extra_values = (
        tensors.pop(name).repeat_interleave(2 // case.kv_heads, dim=2)
        for name in ("additional_keys", "additional_values")
    )
    out, lse = attend(case, tensors, backend, return_lse=True)
    scores = torch.einsum("b...hd,bmhd->b...hm", tensors["query"], extra_keys) * case.dim**-0.5
    extra_out = torch.einsum("b...hm,bmhd->b...hd", scores.softmax(-1), extra_values)
    extra_lse = scores.logsumexp(-1)
    torch.testing.assert_close(lse_together, torch.logaddexp(lse, extra_lse))
    weight = torch.sigmoid(lse - extra_lse).unsqueeze(-1)
    torch.testing.assert_close(together, out * weight + extra_out * (1 - weight))


@every_backend
@some_examples
@given(case=cases(has_rpb=False), return_lse=st.booleans())
def test_the_whole_map_is_full_attention(backend: str | None, case: Case, return_lse: bool) -> None:
    whole = {
        "kernel_size": case.size,
        "stride": (1,) * case.rank,
        "dilation": (1,) * case.rank,
        "is_causal": (False,) * case.rank,
    }
    tensors = make_inputs(case, DTYPE[backend]).present()
    out = attend(case, tensors, backend, **whole, return_lse=return_lse)
    q, k, v = (t.flatten(1, -3).transpose(1, 2) for t in tensors.values())
    true = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    got = out[0] if return_lse else out
    torch.testing.assert_close(got.flatten(1, -3), true.transpose(1, 2))


@every_backend
@some_examples
@given(window=st.integers(1, 5), windows=st.integers(1, 5), seed=st.integers(0, 1000))
def test_stride_of_the_kernel_size_is_window_attention(
    backend: str | None, window: int, windows: int, seed: int
) -> None:
    n = window * windows
    case = Case((n, n), (window,) * 2, (window,) * 2, (1, 1), (False, False), dim=5, seed=seed)
    tensors = make_inputs(case, DTYPE[backend]).present()
    out = attend(case, tensors, backend)

    def cut(tensor: Tensor) -> Tensor:  # (windows, heads, tokens, dim)
        tensor = tensor.unflatten(2, (windows, window)).unflatten(1, (windows, window))
        return tensor.transpose(2, 3).flatten(0, 2).flatten(1, 2).transpose(1, 2)

    true = F.scaled_dot_product_attention(*(cut(t) for t in tensors.values()))
    torch.testing.assert_close(cut(out), true)


@every_backend
@some_examples
@given(case=cases(dilation=None), dilation=st.integers(1, 4))
def test_dilation_is_attention_in_each_group(
    backend: str | None, case: Case, dilation: int
) -> None:
    # Not every size is a multiple: the last groups may then be one shorter.
    ones = {**vars(case), "dilation": (1,) * case.rank}
    stretched = Case(**{**ones, "size": (case.size[0] * dilation + dilation // 2, *case.size[1:])})
    tensors = make_inputs(stretched, DTYPE[backend]).present()
    together = (dilation, *(1,) * (case.rank - 1))
    out = attend(stretched, tensors, backend, dilation=together)
    for group in range(dilation):
        of_group = {
            name: tensor if name == "rpb" else tensor[:, group::dilation]
            for name, tensor in tensors.items()
        }
        true = attend(stretched, of_group, backend)
        torch.testing.assert_close(out[:, group::dilation], true)


@every_backend
def test_keys_that_no_query_sees_have_no_gradient(backend: str | None) -> None:
    query, key, value = (
        torch.randn(2, 10, 2, 8, dtype=DTYPE[backend], requires_grad=True) for _ in range(3)
    )
    # A causal window ends with its query: the last key is the last query's alone.
    out, lse = na1d(
        query, key, value, 3, stride=3, is_causal=True, return_lse=True, backend=backend
    )
    (out[:, :9].sum() + lse[:, :9].square().sum()).backward()
    for grad in (key.grad, value.grad):
        assert torch.count_nonzero(grad[:, 9]) == 0
        assert grad[:, :9].abs().amax((0, 2, 3)).min() > 0


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
