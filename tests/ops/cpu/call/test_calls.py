"""Calls of kernels: arguments, errors, what is remembered, who bypasses torch, huge pages."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import random
from fresh_python import run_code
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ops.cpu.build import compiler
from ops.cpu.build.sources import SOURCES, Sources
from ops.cpu.call.binding import observed_by
from ops.cpu.call.dispatch import is_plain_call, kernels_apply
from ops.cpu.call.huge_pages import ask_for_huge_pages, empty_weight
from ops.cpu.call.structures import parameters
from ops.cpu.depthwise.conv import depthwise_branches, depthwise_conv2d, taps_first
from ops.cpu.gemm.linear import pack_weight, packed_linear, packed_linear_energy
from ops.cpu.gemm.mlp import packed_mlp
from ops.cpu.norm.layer_norm import layer_norm


class _Watch:
    """An observer, for which calls are described."""

    def kernel_called(self, *_: Any) -> None: ...
    def kernel_returned(self, *_: Any) -> None: ...


def test_arguments_by_name_and_by_default() -> None:
    x, weight, bias, eps = random(2, 8).float(), torch.ones(8), torch.zeros(8), 1e-6
    expected = layer_norm(x, weight, bias, eps, "none")
    assert torch.equal(layer_norm(x, weight, eps=eps, bias=bias), expected)
    for arguments, named in (((x, weight), {}), ((x, weight, bias, eps), {"eps": 1.0})):
        with pytest.raises(TypeError, match=r"layer_norm\(\) takes .*missing .*unknown"):
            layer_norm(*arguments, **named)
    with pytest.raises(TypeError, match="takes"):
        layer_norm(x, weight, bias, eps, "none", 1)
    assert "layer_norm" in repr(layer_norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_calls_equal_the_first(dtype: torch.dtype) -> None:
    """What is remembered of a layout gives what a description gives, which observers ask for."""
    packed = pack_weight(random(40, 24).float()), random(40).float()
    maps = [random(2, 24, 9, 7, seed=s).to(dtype) for s in (1, 2)]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    taps, bias = taps_first(random(24, 1, 3, 5)), random(24).float()
    branches = [taps_first(random(4, 1, *sides)) for sides in ((3, 3), (1, 5))], [bias[:4]] * 2
    calls: list[Any] = [
        lambda x: layer_norm(x.permute(0, 2, 3, 1), bias, bias, 1e-6, "gelu"),
        lambda x: layer_norm(x.permute(0, 2, 3, 1), bias, bias, 1e-6, "relu"),
        lambda x: layer_norm(x.permute(0, 2, 3, 1).contiguous()[:, 2:], bias, bias, 1e-2),
        lambda x: layer_norm(x.permute(0, 2, 3, 1).float(), bias, bias, 1e-2),
        lambda x: depthwise_conv2d(x, taps, bias, (2, 1), (1, 2), (1, 2), "gelu"),
        lambda x: depthwise_conv2d(x[:, 4:12], taps[..., 4:12].contiguous()),
        lambda x: depthwise_branches(x, *branches),
        lambda x: packed_linear(x.permute(0, 2, 3, 1).float(), *packed, "gelu"),
        lambda x: packed_linear_energy(x.permute(0, 2, 3, 1).float(), *packed)[1],
        lambda x: layer_norm(x, torch.ones(7), torch.zeros(7), 1e-6),  # is copied
    ]
    with observed_by(_Watch()):
        described = [[call(x) for x in maps] for call in calls]
    for _ in range(3):
        for call, expected in zip(calls, described, strict=True):
            for x, wanted in zip(maps, expected, strict=True):
                out = call(x)
                assert out.stride() == wanted.stride() and out.dtype == wanted.dtype
                assert torch.equal(out, wanted)


def test_a_tensor_given_twice_says_nothing_about_the_next_call() -> None:
    weight, bias = pack_weight(random(24, 24).float()), random(24).float()
    x, other = random(1, 29, 24).float(), random(1, 29, 24, seed=1).float()
    packed_mlp(x, weight, bias, weight, bias, residual=x)
    expected = packed_mlp(x, weight, bias, weight, bias) + other
    for _ in range(2):
        out = packed_mlp(x, weight, bias, weight, bias, residual=other)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "name", ["pooling", *(pytest.param(n, marks=pytest.mark.slow) for n in Sources().all())]
)
def test_structures_are_as_large_as_parsed(name: str, tmp_path: Path) -> None:
    path = Sources().all()[name]
    functions = [f.partition("(")[0] for f in path.read_text("utf-8").split('extern "C" int ')[1:]]
    kinds = {k for f in functions for k in parameters(name, f).values() if k is not None}
    lines = [f"static_assert(sizeof({k.__name__}) == {ctypes.sizeof(k)});" for k in kinds]
    (source := tmp_path / "sizes.cpp").write_text("\n".join([f'#include "{path}"', *lines]))
    options = [f"-I{SOURCES}", "-std=c++17", "-fsyntax-only", str(source)]
    compiler.run([*compiler.find_compilers([])[0], *options], tmp_path)


_WITHOUT_MEMORY = """
import resource, torch
from ops.cpu.pooling.window_means import window_means
small, large = (torch.zeros(1, 1, 1, 64).expand(1, n, 1 << 12, 64) for n in (9, 1 << 12))
print(window_means(small, (1 << 12, 1)).shape)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for threads in (1, 2):
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 27), -1))
    try:
        window_means(large, (1 << 12, 1))
    except MemoryError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(window_means(small, (1 << 12, 1)).shape)
"""


def test_without_memory_for_scratch_buffers(tmp_path) -> None:
    shape, *errors, again = run_code(_WITHOUT_MEMORY, tmp_path).splitlines()
    assert errors == ["no memory for the scratch buffers of window_means"] * 2
    assert shape == again


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_only_plain_calls_use_kernels() -> None:
    x = torch.zeros(2, 3)
    assert is_plain_call((x, None, torch.nn.Parameter(x)))
    for others in ((x, x.to("meta")), (torch.zeros(2, dtype=torch.complex64).conj(),)):
        assert not is_plain_call(others) and not kernels_apply(others)
    with forward_ad.dual_level():
        assert not is_plain_call((x,)) and not kernels_apply((x,))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain_call((x,)) and not kernels_apply((x,))
    # Those that only watch see kernels as operators.
    for watching in (_Mode(), torch.autograd.profiler.profile()):
        with watching:
            assert not is_plain_call((x,)) and kernels_apply((x,))
    assert torch.vmap(lambda row: row * (not is_plain_call((row,))))(x + 1).all()
    assert torch.vmap(lambda row: row * (not kernels_apply((row,))))(x + 1).all()


MIB = 1 << 20
SMAPS = Path("/proc/self/smaps")


def _advised(address: int) -> bool:
    """Whether the mapping around the address may have huge pages."""
    inside = False
    for line in SMAPS.read_text(errors="replace").splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(x, 16) for x in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError(f"no mapping around {address:#x}")


@pytest.mark.parametrize("skipped", [0, 1023])
def test_the_system_is_asked_for_those_of_large_tensors(skipped: int) -> None:
    tensor = torch.empty(48 * MIB, dtype=torch.uint8)[skipped:]
    small = torch.frombuffer(mmap.mmap(-1, 4 * MIB - 1), dtype=torch.uint8)  # not used before
    ask_for_huge_pages(small, tensor, torch.empty(0))
    if Path("/sys/kernel/mm/transparent_hugepage").exists() and SMAPS.exists():
        end = tensor.data_ptr() + tensor.nbytes
        for address in (tensor.data_ptr() + 8192, end - 8192):
            assert _advised(address)
        assert not _advised(small.data_ptr() + small.nbytes // 2)
    assert tensor.fill_(3).eq(3).all()


def test_weights_share_huge_pages_and_no_bytes() -> None:
    sizes = (7, 1 << 16, 3 << 18, 5 << 20, 0, 1 << 20)
    dtypes = (torch.float32, torch.bfloat16, torch.int8) * 2
    with torch.inference_mode():
        weights = [empty_weight(n, dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    for number, weight in enumerate(weights):
        weight.fill_(number)
    for number, weight in enumerate(weights):
        assert (weight.numel(), weight.dtype) == (sizes[number], dtypes[number])
        assert weight.data_ptr() % 64 == 0 and not weight.is_inference()
        assert weight.eq(number).all()
    if Path("/sys/kernel/mm/transparent_hugepage").exists() and SMAPS.exists():
        assert all(_advised(weight.data_ptr()) for weight in weights[:3])
