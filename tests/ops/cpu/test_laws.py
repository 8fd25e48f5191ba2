"""What holds for every kernel: instruction sets, threads, strides, empty batches, bad arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_kernels import compiled_for, using_threads, without_kernels
from kernel_calls import CALLS, every_kernel
from torch import Tensor

from ops import cpu
from ops.cpu import instruction_sets

EVERY = pytest.mark.parametrize("name", CALLS)
PLAINER = [s for s in instruction_sets.candidates()[1:] if s in ("avx2", "neon", "portable")]
# What packs weights for int8 is tested in test_linear.py.
IN_FLOATS = [name for name in CALLS if "int8" not in name]
# Which take images with pixels.
NOT_EMPTY = ("biased_softmax", "na_cpu_dynamic_mix", "response_scales")
HALF_TOO = ("depthwise_conv2d", "depthwise_conv2d 3", "depthwise_branches", "layer_norm",
            "rms_norm", "nchw_from_nhwc", "nhwc_from_nchw", "window_means", "window_pool",
            "map_scan", "mixed_scan", "normed_scan", "shifted_mixtures",
            "bi_wkv_forward")  # fmt: skip


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _run(name: str, **changes: Any) -> list[Tensor]:
    kernel, _, given = CALLS[name]()
    return _outputs(kernel(**{**given, **changes}))


def _halved(name: str) -> dict[str, Tensor]:
    """Its maps in bfloat16."""
    _, batched, given = CALLS[name]()
    return {n: given[n].bfloat16() for n in batched}


def _assert_near(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b).abs().max() <= bound * b.abs().max()


def test_every_kernel_has_a_call() -> None:
    """But for those whose tests go through the functions of attention."""
    called = {make()[0].name for make in CALLS.values()}
    missing = {kernel.name for kernel in every_kernel()} - called
    assert not {n for n in missing if not n.startswith(("na_cpu", "grouped_attention"))}


@pytest.mark.parametrize("isa", PLAINER)
@pytest.mark.parametrize("name", IN_FLOATS)
def test_instruction_sets_compute_the_same(
    name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _run(name)
    half = _run(name, **_halved(name)) if name in HALF_TOO else []
    compiled_for(isa, monkeypatch)
    _assert_near(_run(name), expected, 1e-5)
    if half:
        _assert_near(_run(name, **_halved(name)), half, 2**-6)
    assert cpu.status(CALLS[name]()[0].library).instruction_set == isa


@EVERY
def test_threads_change_nothing(name: str) -> None:
    outs = []
    for threads in (1, 2, 3, 3):
        with using_threads(threads):
            outs.append(_run(name))
    sums = ("linear", "kan", "expansion")  # which threads add up
    for others in outs[1:]:
        _assert_near(others, outs[0], 1e-6 if any(word in name for word in sums) else 0)


def _turned(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _cut(t: Tensor) -> Tensor:
    """From between numbers that must not be read."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), torch.nan if t.is_floating_point() else 99)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def _inset(t: Tensor) -> Tensor:
    """From a map whose rows are longer."""
    if t.ndim < 3:
        return _cut(t)
    wide = t.new_full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1]), torch.nan)
    wide[..., 1:-2, :] = t
    return wide[..., 1:-2, :]


def _spread(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, 0)[::2]


def _assert_same_or_refused(name: str, given: dict[str, Any], expected: list[Tensor]) -> None:
    try:
        found = _outputs(CALLS[name]()[0](**given))
    except ValueError as error:
        assert "contiguous" in str(error)
    else:
        assert all(map(torch.equal, found, expected))


def _is_packed(argument: str, value: Tensor) -> bool:
    """Vectors that lie as they were packed or calibrated."""
    return value.ndim == 1 and argument.startswith(("weight", "bias", "in_range"))


@EVERY
@pytest.mark.parametrize(
    "laid_out",
    [
        *(_turned, _cut, _inset, _spread),
        # Steps of nothing: repeated images, rows and values.
        lambda t: t[:1].expand_as(t) if t.ndim > 1 else t,
        lambda t: t[(0,) * (t.ndim - 1)].expand_as(t),
        lambda t: t[..., :1].expand_as(t) if t.ndim > 1 else t,
    ],
)
def test_strides_change_nothing(name: str, laid_out: Callable[[Tensor], Tensor]) -> None:
    kernel, _, given = CALLS[name]()
    for argument, value in given.items():
        if not isinstance(value, Tensor) or _is_packed(argument, value):
            continue
        same = laid_out(value)
        expected = _outputs(kernel(**{**given, argument: same.contiguous()}))
        _assert_same_or_refused(name, {**given, argument: same}, expected)


@pytest.mark.parametrize("name", [n for n in CALLS if n not in NOT_EMPTY])
def test_no_images(name: str) -> None:
    kernel, batched, given = CALLS[name]()
    expected = _outputs(kernel(**given))
    outs = _outputs(kernel(**{**given, **{n: given[n][:0] for n in batched if n in given}}))
    assert [out.dtype for out in outs] == [out.dtype for out in expected]
    assert 0 in outs[0].shape and outs[0].ndim == expected[0].ndim


@EVERY
def test_other_dtypes_are_refused(name: str) -> None:
    """Or converted, as the kernel only gets an address."""
    kernel, batched, given = CALLS[name]()
    expected = _outputs(kernel(**given))
    for argument in batched:
        changed = {**given, argument: given[argument].double()}
        if argument == "offset":
            assert all(map(torch.equal, _outputs(kernel(**changed)), expected))
        else:
            with pytest.raises((ValueError, RuntimeError), match=r"torch\.|float"):
                kernel(**changed)
    first = given[batched[0]]
    for said, device, dtype in (
        ("float64", first.device, torch.float64),
        ("meta", torch.device("meta"), first.dtype),
    ):
        assert said in (kernel.unavailable(device, dtype, even_if_slower=True) or "")


@EVERY
def test_other_dtypes_of_weights_are_refused(name: str) -> None:
    """Or converted: a kernel gets an address and takes what lies there for float32."""
    kernel, batched, given = CALLS[name]()
    expected = _outputs(kernel(**given))
    for argument, value in given.items():
        parts = value if isinstance(value, list) else [value]
        for i, part in enumerate(parts):
            if argument in batched or not isinstance(part, Tensor) or part.dtype != torch.float32:
                continue
            for dtype in (torch.float64, torch.bfloat16):
                changed = [*parts[:i], part.to(dtype), *parts[i + 1 :]]
                changed = changed if isinstance(value, list) else changed[0]
                try:
                    found = _outputs(kernel(**{**given, argument: changed}))
                except (ValueError, RuntimeError) as error:
                    assert re.search(r"torch\.|float", str(error)), argument
                else:
                    _assert_near(found, expected, 2**-6)


@EVERY
def test_other_activations_are_refused(name: str) -> None:
    kernel, _, given = CALLS[name]()
    for argument in ("activation", "conv_activation"):
        if argument in given:
            with pytest.raises(ValueError, match=r"one of .*got 'softplus'|or .*got 'softplus'"):
                kernel(**{**given, argument: "softplus"})


# The others check shapes in the class or the function that calls them, or take fewer channels.
@pytest.mark.parametrize("name", [n for n in CALLS if n.endswith(("norm", "softmax", "attention",
    "scales", "_mlp", "packed_linear", "packed_linear_int8", "nhwc_from_nchw", "mixtures",
    "normed_scan", "forward")) and not n.startswith(("cascaded", "depthwise", "response_mlp"))]
)  # fmt: skip
def test_other_shapes_are_refused(name: str) -> None:
    kernel, _, given = CALLS[name]()
    for argument, value in given.items():
        if isinstance(value, Tensor):
            with pytest.raises(ValueError, match="got"):
                kernel(**{**given, argument: value[..., :-1]})


@EVERY
def test_without_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, batched, given = CALLS[name]()
    without_kernels(monkeypatch)
    device, dtype = given[batched[0]].device, given[batched[0]].dtype
    assert "VISION_BACKBONES_NATIVE=0" in (kernel.unavailable(device, dtype) or "")
    # Threads that no call before had.
    with using_threads(5), pytest.raises(RuntimeError, match="not available: switched off"):
        kernel(**given)


@EVERY
def test_as_an_operator_of_torch(name: str) -> None:
    kernel, _, given = CALLS[name]()
    expected = _outputs(kernel(**given))
    with torch.profiler.profile() as profiler:
        profiled = _outputs(kernel(**given))
    assert all(map(torch.equal, profiled, expected))
    assert f"vision_backbones::{kernel.name}" in {event.name for event in profiler.events()}
    bound = inspect.signature(kernel).bind(**given)
    bound.apply_defaults()
    operator = getattr(torch.ops.vision_backbones, kernel.name).default
    torch.library.opcheck(operator, bound.args, test_utils=("test_schema", "test_faketensor"))
