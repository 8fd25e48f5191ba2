"""The binding: arguments, errors, cached plans, observers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from compiled_kernels import linear_layer, random, using_threads
from torch import Tensor

from ops.cpu.call import binding
from ops.cpu.call.binding import Kernel, observed_by
from ops.cpu.call.c_arguments import Addresses, Call, words_of
from ops.cpu.call.structures import structure
from ops.cpu.depthwise.conv import depthwise_branches, depthwise_conv2d, taps_first
from ops.cpu.gemm.linear import pack_weight, packed_linear, packed_linear_energy
from ops.cpu.gemm.mlp import packed_mlp
from ops.cpu.norm.layer_norm import layer_norm


class _Watch:
    def __init__(self) -> None:
        self.calls: list[tuple[Kernel, Sequence[Any]]] = []
        self.returns: list[tuple[Kernel, dict[str, Any], Any]] = []

    def kernel_called(self, called: Kernel, function: Any, arguments: Sequence[Any]) -> None:
        self.calls.append((called, arguments))

    def kernel_returned(self, called: Kernel, given: dict[str, Any], result: Any) -> None:
        self.returns.append((called, given, result))


def _norm(*shape: int) -> tuple[Tensor, Tensor, Tensor, float]:
    return random(*shape).float(), torch.ones(shape[-1]), torch.zeros(shape[-1]), 1e-6


def test_arguments_by_name_and_by_default() -> None:
    x, weight, bias, eps = _norm(2, 8)
    expected = layer_norm(x, weight, bias, eps, "none")
    assert torch.equal(layer_norm(x, weight, eps=eps, bias=bias), expected)
    for arguments, named in (((x, weight), {}), ((x, weight, bias, eps), {"eps": 1.0})):
        with pytest.raises(TypeError, match=r"layer_norm\(\) takes .*missing .*unknown"):
            layer_norm(*arguments, **named)
    with pytest.raises(TypeError, match="takes"):
        layer_norm(x, weight, bias, eps, "none", 1)
    assert repr(layer_norm) == "<kernel layer_norm: norm_forward of norm>"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_calls_equal_unplanned_ones(dtype: torch.dtype, monkeypatch) -> None:
    """What is remembered of a layout gives what a description gives, for tensors of any memory."""
    _, _, packed = linear_layer(24, 40, torch.float32)
    maps = [
        random(2, 24, 9, 7, seed=s).to(dtype, memory_format=torch.channels_last) for s in (1, 2)
    ]
    taps, bias = taps_first(random(24, 1, 3, 5)), random(24).float()
    branches = [taps_first(random(4, 1, *sides)) for sides in ((3, 3), (1, 5))], [bias[:4]] * 2
    calls: list[Any] = [
        lambda x: layer_norm(x.permute(0, 2, 3, 1), bias, bias, 1e-6, "gelu"),
        lambda x: depthwise_conv2d(x, taps, bias, (2, 1), (1, 2), (1, 2), "gelu"),
        lambda x: depthwise_conv2d(x[:, 4:12], taps[..., 4:12].contiguous()),
        lambda x: depthwise_branches(x, *branches),
        lambda x: packed_linear(x.permute(0, 2, 3, 1).float(), *packed, "gelu"),
        lambda x: packed_linear_energy(x.permute(0, 2, 3, 1).float(), *packed)[1],
        lambda x: layer_norm(x, torch.ones(7), torch.zeros(7), 1e-6),  # is copied
    ]
    for call in calls:
        outs = [call(x) for x in (*maps, *maps)]
        for out in outs:
            assert out.stride() == outs[0].stride() and out.dtype == outs[0].dtype
        assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
        with monkeypatch.context() as patch:
            patch.setattr(binding.RepeatedCall, "of", lambda *_: None)
            for kernel in (layer_norm, depthwise_conv2d, depthwise_branches, packed_linear):
                kernel._plans.clear()
            assert torch.equal(call(maps[1]), outs[1])


def test_a_layout_is_described_once(monkeypatch) -> None:
    described = []
    describe = layer_norm._describe
    monkeypatch.setattr(layer_norm, "_describe", lambda *a: described.append(0) or describe(*a))
    layer_norm._plans.clear()
    x, weight, bias, eps = _norm(3, 4, 8)
    for image in (x, -x, x.clone()):
        layer_norm(image, weight, bias, eps)
    assert len(described) == 1
    for other in (x.bfloat16(), x[:2], x.transpose(0, 1).contiguous()):
        layer_norm(other, weight, bias, eps)
    layer_norm(x, weight, bias, eps, "relu")
    with using_threads(torch.get_num_threads() + 1):
        layer_norm(x, weight, bias, eps)
    assert len(described) == 6


def test_a_tensor_given_twice_says_nothing_about_the_next_call() -> None:
    weight, bias = pack_weight(random(24, 24).float()), random(24).float()
    x, other = random(1, 29, 24).float(), random(1, 29, 24, seed=1).float()
    packed_mlp(x, weight, bias, weight, bias, residual=x)
    expected = packed_mlp(x, weight, bias, weight, bias) + other
    for _ in range(2):
        out = packed_mlp(x, weight, bias, weight, bias, residual=other)
        torch.testing.assert_close(out, expected)


def test_the_layout_cache_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(binding, "_MOST_PLANS", 4)
    for rows in range(1, 12):
        layer_norm(*_norm(rows, 8))
        assert 1 <= len(layer_norm._plans) <= max(4, 1)


def test_dtypes_that_the_kernel_would_misread_are_refused() -> None:
    x, weight, bias, eps = _norm(2, 8)
    for dtype in (torch.float64, torch.float16, torch.int32):
        with pytest.raises(RuntimeError, match=f"layer_norm is not available.*{dtype}"):
            layer_norm(x.to(dtype), weight, bias, eps)


def test_observers_see_every_call_of_their_thread() -> None:
    x, weight, bias, eps = _norm(2, 8)
    layer_norm(x, weight, bias, eps)
    with observed_by(_Watch()) as outer, observed_by(_Watch()) as inner:
        expected = layer_norm(x, weight, bias, eps)
        layer_norm(x[:0], weight, bias, eps)  # calls nothing
    ((called, (problem, addresses)),) = inner.calls
    assert called is layer_norm and problem.pixels == 2 and not outer.calls
    assert addresses.fields["in"] is x
    ((returned, given, result),) = inner.returns
    assert returned is layer_norm and result is expected and not outer.returns
    assert given["x"] is x and given["eps"] == eps and given["activation"] == "none"
    layer_norm(x, weight, bias, eps)
    assert len(inner.calls) == 1


def test_words_are_those_of_the_structure() -> None:
    tensors, layer = (
        structure(h, n)
        for h, n in (("norm/norm.h", "norm::Tensors"), ("stem/stem.cpp", "stem::Layer"))
    )
    x = torch.zeros(4)
    assert words_of(Addresses(tensors, {"in": x, "bias": (x, 8)})) == [(x, 0), 0, (x, 8), 0]
    (*_, eps) = Addresses(layer, {"eps": 0.5}).words()
    assert ctypes.c_double.from_buffer(ctypes.c_int64(eps)).value == 0.5
    assert words_of(7) is None and words_of(x) is None


def test_names_that_the_function_does_not_take_are_refused(monkeypatch) -> None:
    describe = layer_norm._describe
    monkeypatch.setattr(
        layer_norm, "_describe", lambda *a: Call(describe(*a).result, lambda: {"pixel": 2})
    )
    layer_norm._plans.clear()
    with pytest.raises(TypeError, match=r"norm_forward takes no \['pixel'\]"):
        layer_norm(*_norm(2, 8))


def test_parameters_with_strides_are_copied() -> None:
    x, weight, bias, eps = _norm(5, 8)
    weight, bias = random(16).float(), random(16, seed=1).float()
    expected = layer_norm(x, weight[::2].contiguous(), bias[1::2].contiguous(), eps)
    for _ in range(2):
        assert torch.equal(layer_norm(x, weight[::2], bias[1::2], eps), expected)


def test_another_library_is_refused(monkeypatch) -> None:
    class Problem(ctypes.Structure):
        _fields_ = [("pixels", ctypes.c_int64)]

    Problem.__name__ = "norm::Problem"
    describe = layer_norm._describe

    def described(*args: Any) -> Call:
        return Call(describe(*args).result, lambda: (Problem(1),))

    monkeypatch.setattr(layer_norm, "_describe", described)
    layer_norm._plans.clear()
    with pytest.raises(RuntimeError, match="norm::Problem has 48 bytes in the library and 8 here"):
        layer_norm(*_norm(2, 8))


def test_no_memory(monkeypatch) -> None:
    monkeypatch.setattr(layer_norm, "_function", lambda: lambda *_: 1)
    with pytest.raises(MemoryError, match="scratch buffers of layer_norm"):
        layer_norm(*_norm(5, 8))
