"""Capture and replay: recorded calls, memory plans, and arguments of kernels."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from compiled_kernels import using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.cpu.pooling.window_means import window_means
from ops.replay import lowering as pointwise
from ops.replay.capture import Capture
from ops.replay.graph import Buffer, NotCapturableError, View
from ops.replay.memory_plan import Use, lay_out
from ops.replay.replay import Replay


def _replay(function: Callable[[Tensor], Tensor], x: Tensor) -> Replay:
    with torch.no_grad(), Capture(x) as capture:
        result = function(x)
    return Replay(capture.finish(result))


# -- pointwise calls -----------------------------------------------------------------------------
_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=3).flatmap(
    lambda outer: st.integers(1, 40).map(lambda inner: (*outer, inner))
)


@st.composite
def _functions(draw: st.DrawFn) -> tuple[tuple[int, ...], torch.dtype, Callable[[Tensor], Tensor]]:
    """The shape of an input, its dtype, and a function of it."""
    shape = draw(_sizes)
    rank = len(shape)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    order = draw(st.permutations(range(rank)))
    cut = draw(st.integers(0, min(shape) - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    axis = draw(st.integers(-rank, rank - 1))

    def view(x: Tensor) -> Tensor:
        return x.permute(order)[..., cut:]

    kept = [1 if draw(st.booleans()) else n for n in view(torch.empty(shape)).shape]
    other = torch.randn(kept[draw(st.integers(0, rank)) :], generator=generator).to(dtype)
    length = view(torch.empty(shape)).shape[axis]
    index = torch.randint(length, (draw(st.integers(1, 9)),), generator=generator)
    nothing = torch.empty(0, *view(torch.empty(shape)).shape[1:], dtype=dtype)
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: view(x).contiguous().mul(2),
        lambda x: view(x).clone(),
        lambda x: view(x).flatten().clone(),
        lambda x: view(x).reshape(-1, 1).clone(),
        lambda x: view(x) + other,
        lambda x: other * view(x),
        lambda x: view(x).sub(other),
        lambda x: other - view(x),
        lambda x: view(x) * view(x).contiguous(),
        lambda x: view(x).clone().add_(other),
        lambda x: view(x).clone().mul_(view(x)),
        lambda x: view(x).index_select(axis, index),
        lambda x: torch.addcmul(other, view(x), view(x)),
        lambda x: torch.addcmul(view(x), other, view(x)),
        lambda x: torch.cat([view(x), view(x).narrow(axis, 0, 1), view(x)], axis),
        lambda x: torch.cat([nothing, view(x)]),
    ]
    return shape, dtype, draw(st.sampled_from(functions))


@settings(max_examples=150)
@given(case=_functions(), threads=st.integers(1, 2))
def test_pointwise_calls_equal_torchs_bitwise(case, threads: int) -> None:
    shape, dtype, function = case
    with using_threads(threads), mock.patch.object(pointwise, "VALUES", 1):
        replay = _replay(function, torch.zeros(shape, dtype=dtype))
        for seed in range(2):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            expected, out = function(x.clone()), replay(x.clone())
            assert torch.equal(out, expected) and out.stride() == expected.stride()


_OTHER = torch.randn(3, 8)
_SECOND, _ORDER = torch.tensor([1]), torch.tensor([2, 1, 0, 0])
_LSTM = torch.nn.LSTM(8, 4, bidirectional=True).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.add(_OTHER, alpha=2),
        lambda x: x.clone().add_(_OTHER, alpha=-0.5),
        lambda x: x.sub(_OTHER, alpha=3),
        lambda x: x[None, :, None].clone(memory_format=torch.channels_last),
        lambda x: torch.stack([x.sort().values, x.sort().indices.float()]),
        lambda x: torch.cat(x.aminmax(dim=0, keepdim=True)),
        lambda x: torch.cat([x, x.double()]),
        lambda x: x.clone().fill_(2).index_fill_(0, _SECOND, 3),
        lambda x: torch.linalg.norm(x, dim=1) + torch.ones(3).cumsum(0),
        lambda x: _with_first_row(torch.empty_like(x), x),
        lambda x: torch.sub(x, x.flip(0), out=torch.empty(3, 8)),
        lambda x: x[:, _ORDER],
        lambda x: x.view(3, 2, 4).index_select(-1, _ORDER),
        lambda x: x.index_select(0, _ORDER[::2]),
        lambda x: _LSTM(x)[0],
    ],
)
def test_operators_are_known_by_their_schemas(function: Callable[[Tensor], Tensor]) -> None:
    with using_threads(1):
        replay = _replay(function, torch.zeros(3, 8))
        x = torch.randn(3, 8)
        expected, out = function(x), replay(x)
        assert torch.equal(out, expected) and out.stride() == expected.stride()


def _with_first_row(out: Tensor, x: Tensor) -> Tensor:
    out[:1], out[1:] = x[1:2] + 1, x[1:]
    return out


def test_special_numbers_in_bfloat16() -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, -0.0])
    x = special.bfloat16().repeat(6, 8)
    other = special.bfloat16().repeat_interleave(8)
    for function in (lambda x: x + other, lambda x: x * other, lambda x: x.sub(other)):
        torch.testing.assert_close(
            _replay(function, x)(x), function(x), rtol=0, atol=0, equal_nan=True
        )


# -- memory --------------------------------------------------------------------------------------
_lives = st.tuples(st.integers(0, 20), st.integers(0, 6), st.integers(1, 5000), st.booleans())
_LARGE = 8 << 20  # bytes


def _buffer(size: int) -> Buffer:
    return Buffer((size,), (1,), torch.uint8, 0, size)


@given(lives=st.lists(_lives, min_size=1, max_size=30))
def test_live_buffers_do_not_overlap(lives: list[tuple[int, int, int, bool]]) -> None:
    calls = 40
    buffers = [_buffer(1)]
    uses = [Use(-1, calls)]
    for first, length, size, made in lives:
        buffers.append(_buffer(size))
        uses.append(Use(first, first + length, made))
    buffers += [_buffer(1), _buffer(1 << 20)]
    uses += [Use(3, calls), Use(calls, -1)]  # the result, and an unused buffer
    offsets, total = lay_out(buffers, uses)
    assert set(offsets) == {i + 1 for i, (*_, made) in enumerate(lives) if not made}
    for i, offset in offsets.items():
        assert offset % 64 == 0 and offset + buffers[i].end <= total
        for j, other in offsets.items():
            at_once = uses[i].first <= uses[j].last and uses[j].first <= uses[i].last
            if i < j and at_once:
                assert offset + buffers[i].end <= other or other + buffers[j].end <= offset
    assert total <= sum(-(-b.end // 64) * 64 for b in buffers)


def test_maps_share_memory_with_those_before_them() -> None:
    """Maps of any size, from kernels and passed to torch; the result has memory of its own."""

    def function(x: Tensor) -> Tensor:
        for _ in range(6):
            means = window_means(x, (1, 1))
            x = window_means(means.sqrt(), (1, 1)) * means[:, 1:].mean()
        return x + 1.0

    inputs = [torch.rand(1, _LARGE // 4 // 32**2, 32, 32) for _ in range(3)]
    with using_threads(1):
        replay = _replay(function, inputs[0])
    assert replay.plan.nbytes == 2 * _LARGE
    results = [replay(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, function(x))


# -- kernels -------------------------------------------------------------------------------------
def test_only_new_memory_can_be_a_result() -> None:
    x, constant = torch.zeros(4), torch.zeros(4)
    with Capture(x) as capture:
        pass
    for result, message in ((constant, "a Tensor, does not"), ((1, "a"), "a tuple, does not")):
        with pytest.raises(NotCapturableError, match=message):
            capture.finish(result)
    assert capture.finish(x[1:]).result == View(0, (3,), (1,), 1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.view(torch.int32), "different dtype"),
        (lambda x: x[:0].clone(), "does not depend on the input"),
    ],
)
def test_operations_that_cannot_be_replayed(
    function: Callable[[Tensor], Tensor], message: str
) -> None:
    x = torch.ones(4)
    with Capture(x) as capture:
        out = function(x)
    assert isinstance(out, Tensor)
    with pytest.raises(NotCapturableError, match=message):
        capture.finish(out)
