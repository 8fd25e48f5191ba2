"""Capture and replay: recorded calls, memory plans, and arguments of kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from compiled_kernels import using_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.cpu.norm.layer_norm import layer_norm
from ops.cpu.pooling.window_means import window_means
from ops.replay import lowering as pointwise
from ops.replay.capture import Capture
from ops.replay.graph import (
    Block,
    Buffer,
    Graph,
    KernelCall,
    NotCapturableError,
    Place,
    TorchCall,
    View,
)
from ops.replay.memory_plan import Use, lay_out
from ops.replay.replay import Replay


def _replay(function: Callable[[Tensor], Tensor], x: Tensor) -> Replay:
    with torch.no_grad(), Capture(x) as capture:
        result = function(x)
    return Replay(capture.finish(result))


def _torch_calls(function: Callable[[Tensor], Tensor], x: Tensor) -> list[str]:
    with torch.no_grad(), Capture(x) as capture:
        function(x)
    return [call.name for call in capture.calls if isinstance(call, TorchCall)]


def _steps(replay: Replay) -> list[str]:
    return [step.__qualname__ for step in replay._steps if hasattr(step, "__qualname__")]


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
    ]
    return shape, dtype, draw(st.sampled_from(functions))


@settings(max_examples=150, deadline=None)
@given(case=_functions(), threads=st.integers(1, 2))
def test_pointwise_calls_equal_torchs_bitwise(case, threads: int) -> None:
    shape, dtype, function = case
    with using_threads(threads), mock.patch.object(pointwise, "VALUES", 1):
        replay = _replay(function, torch.zeros(shape, dtype=dtype))
        for seed in range(2):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            expected, out = function(x.clone()), replay(x.clone())
            assert torch.equal(out, expected) and out.stride() == expected.stride()


def test_small_calls_need_no_torch() -> None:
    bias = torch.randn(4, 1, 8)
    order = torch.tensor([3, 0, 0])
    x = torch.randn(4, 4, 8)
    with using_threads(1):
        assert len(_torch_calls(lambda x: (x + bias).index_select(1, order), x)) == 2
        replay = _replay(lambda x: (x + bias).index_select(1, order), x)
        assert not any("torch" in name for name in _steps(replay))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x.add(y, alpha=2),
        lambda x, y: x.clone().add_(y, alpha=-0.5),
        lambda x, y: x.sub(y, alpha=3),
        lambda x, y: x.clone(memory_format=torch.channels_last),
    ],
)
def test_keywords_of_calls_have_their_effect(
    function: Callable[[Tensor, Tensor], Tensor],
) -> None:
    other = torch.randn(2, 3, 4, 8)
    with using_threads(1):
        replay = _replay(lambda x: function(x, other), torch.zeros(2, 3, 4, 8))
        x = torch.randn(2, 3, 4, 8)
        expected, out = function(x, other), replay(x)
        assert torch.equal(out, expected) and out.stride() == expected.stride()


_SECOND, _ORDER = torch.tensor([1]), torch.tensor([2, 0, 0])
_LSTM = torch.nn.LSTM(8, 4, bidirectional=True).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.stack([x.sort().values, x.sort().indices.float()]),
        lambda x: torch.cat(x.aminmax(dim=0, keepdim=True)),
        lambda x: x.clone().fill_(2).index_fill_(0, _SECOND, 3),
        lambda x: torch.linalg.norm(x, dim=1) + torch.ones(3).cumsum(0),
        lambda x: _with_first_row(torch.empty_like(x), x),
        lambda x: torch.sub(x, x.flip(0), out=torch.empty(3, 8)),
        lambda x: x[:, _ORDER],
        lambda x: _LSTM(x)[0],
    ],
)
def test_operators_are_known_by_their_schemas(function: Callable[[Tensor], Tensor]) -> None:
    replay = _replay(function, torch.zeros(3, 8))
    x = torch.randn(3, 8)
    assert torch.equal(replay(x), function(x))


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


def test_large_torch_results_have_their_own_memory() -> None:
    size = _LARGE // 4
    with using_threads(1):
        replay = _replay(lambda x: (x + x).mul(x).reshape(-1, 64) + 1.0, torch.zeros(size))
    assert replay.plan.nbytes == 0
    assert any("release" in name for name in _steps(replay))
    x = torch.randn(size)
    assert torch.equal(replay(x), (x + x).mul(x).reshape(-1, 64) + 1.0)


def test_concurrent_replays() -> None:
    inputs = [torch.rand(1 << 16) for _ in range(8)]
    replay = _replay(lambda x: (x + 1.0).mul(x).add(x).mul(x) + x, inputs[0])
    expected = [replay(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            assert all(map(torch.equal, pool.map(replay, inputs), expected))


def test_torch_results_are_freed_after_last_use() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(10):
            x = x.sqrt().sigmoid()
        return x

    x = torch.rand(50)
    replay = _replay(function, x)
    tensors: list[Tensor | None] = [x, *[None] * (replay._count - 1)]
    bases = replay._bases()
    for step in replay._steps:
        step(tensors, bases)
        assert sum(t is not None for t in tensors) <= 3
    assert replay._count == 21


def test_a_capture_keeps_nothing_alive() -> None:
    """Memory is reused during a capture, and the buffers are distinguished."""

    other = torch.randn(1 << 20)

    def function(x: Tensor) -> Tensor:
        for _ in range(8):
            x = (x + 1.0).mul(other)
            alive.append(len(capture._by_storage))
        return x

    alive: list[int] = []
    first = torch.randn(1 << 20)
    with torch.no_grad(), Capture(first) as capture:
        result = function(first)
    replay = Replay(capture.finish(result))
    assert max(alive) <= 3 and len(capture.buffers) == 17
    x = torch.randn(1 << 20)
    assert torch.equal(replay(x), function(x))


# -- kernels -------------------------------------------------------------------------------------


class _Fields(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("begins", ctypes.c_void_p * 2)]


def _by_hand(calls: list[KernelCall], x: Tensor, out: Tensor) -> Replay:
    capture = Capture(x)
    capture.calls += calls
    begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
    capture.buffers.append(Buffer(tuple(out.shape), out.stride(), out.dtype, begin, end))
    result = View(1, tuple(out.shape), out.stride(), 0)
    return Replay(Graph(capture.calls, capture.buffers, capture.constants, result))


def _kernel(arguments: int, run: Callable[..., int]) -> tuple[int, object]:
    """The address of a kernel function, and an object that must be kept alive for it."""
    kept = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * arguments)(run)
    address = ctypes.cast(kept, ctypes.c_void_p).value
    assert address is not None
    return address, kept


@pytest.mark.parametrize("more", [0, 1, 2])
def test_kernels_receive_addresses(more: int) -> None:
    seen: list[tuple[int, ...]] = []

    def run(block: int, place: int, *values: int) -> int:
        fields = _Fields.from_address(block)
        seen.append((fields.count, *fields.begins, place, *values))
        return 0

    function, kept = _kernel(2 + more, run)
    data = bytes(_Fields(7, (ctypes.c_void_p * 2)(None, None)))
    block = Block(data, ((8, Place(0, 4)), (16, Place(1, 12))))
    x, out = torch.zeros(4), torch.zeros(4)
    replay = _by_hand([KernelCall(function, [block, Place(0, 8), *range(more)])], x, out)
    for x in (torch.zeros(4), torch.zeros(8)[4:]):
        result = replay(x)
        begin, end = x.data_ptr(), result.data_ptr()
        assert seen.pop() == (7, begin + 4, end + 12, begin + 8, *range(more))
    assert kept is not None and not seen


def test_a_kernel_without_memory() -> None:
    function, _kept = _kernel(2, lambda a, b: 1)
    replay = _by_hand([KernelCall(function, [Place(1, 0), 5])], torch.zeros(2), torch.zeros(2))
    with pytest.raises(MemoryError, match="scratch of a kernel"):
        replay(torch.zeros(2))


def test_mismatched_calls_are_rejected() -> None:
    x = torch.zeros(2)
    with pytest.raises(NotCapturableError, match="takes 5 arguments"):
        _by_hand([KernelCall(0, [0] * 5)], x, torch.zeros(2))
    block = Block(bytes(8000), ((0, Place(0, 0)),))
    with pytest.raises(NotCapturableError, match="8000 bytes"):
        _by_hand([KernelCall(0, [block, 0])], x, torch.zeros(2))


def test_kernels_hand_over_their_tensors() -> None:
    x, weight, bias = torch.randn(2, 8), torch.ones(8), torch.zeros(8)
    with torch.no_grad(), Capture(x) as capture:
        out = layer_norm(x * 1.0, weight, bias, 1e-6)
    assert capture.failure is None
    (call,) = (call for call in capture.calls if isinstance(call, KernelCall))
    _, tensors = call.arguments
    assert isinstance(tensors, Block)
    assert tensors.places == ((0, Place(1, 0)), (24, Place(2, 0)))
    assert tensors.data[8:16] == weight.data_ptr().to_bytes(8, "little")
    kept = [storage.data_ptr() for storage in capture.constants]
    assert {weight.data_ptr(), bias.data_ptr()} <= set(kept)
    replay = Replay(capture.finish(out))
    other = torch.randn(2, 8)
    assert torch.equal(replay(other), layer_norm(other * 1.0, weight, bias, 1e-6))


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
        (lambda x: x + torch.rand(4), "rand.default cannot be replayed"),
        (lambda x: x * x.sum().item(), "aten.item.default gives a float"),
        (lambda x: x if bool(x.sum()) else -x, "gives a bool"),
        (lambda x: x.view(torch.int32), "another dtype"),
        (lambda x: x[:0].clone(), "does not follow from the input"),
        (lambda x: torch.dropout(x, 0.5, True), "dropout.default cannot be replayed"),
        (lambda x: x[x > 0], "index.Tensor cannot be replayed"),
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


def test_a_graph_can_be_printed() -> None:
    x, ones, zeros = torch.randn(2, 8), torch.ones(8), torch.zeros(8)
    with torch.no_grad(), Capture(x) as capture:
        out = layer_norm(x.sqrt(), ones, zeros, 1e-6)[:1]
    lines = str(capture.finish(out)).splitlines()
    assert lines == [
        "torch   %1 = aten.sqrt.default(%0)",
        "kernel  layer_norm(%1, %2)",
        "return  %2",
        *(f"%{i}: 2×8 float32, 64 bytes" for i in range(3)),
    ]
