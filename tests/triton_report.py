"""Compile the Triton kernels of neighborhood attention and report the resources that they need.

No GPU is needed. For every kernel that a call would launch, with all tiles that autotuning would
try, a line of JSON gives the registers per thread, the bytes that are spilled, and the shared
memory per program::

    python tests/triton_report.py --arch 80 90 --dtype float32 bfloat16 --head-dim 32 64 128

Spills and shared memory are of one program; a thread has at most 255 registers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ops.neighborhood._geometry import NAParams
from ops.neighborhood.triton import launch, split_launch, tiles
from ops.triton_devices import LAUNCH_OPTIONS

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# Kernel sizes in the report, by rank.
_KERNEL_SIZES = {1: (63,), 2: (7, 7), 3: (3, 7, 7)}
_SIZES = {1: (4096,), 2: (56, 56), 3: (8, 28, 28)}


@dataclass(frozen=True)
class Start:
    """A launch: a kernel with its arguments; ``config`` is one of its tiles."""

    kernel: Any
    arguments: dict[str, Any]
    config: triton.Config


def starts(
    rank: int, head_dim: int, dtype: torch.dtype, extra: bool, rpb: bool, first: bool
) -> Iterator[Start]:
    """Every kernel of a forward and backward call, with every tile that would be tried, or only
    the ``first`` one, which is used without autotuning.

    The launcher runs on tensors of the meta device; launches are recorded instead of executed.
    """
    recorded: list[tuple[Any, dict[str, Any], triton.Config | None]] = []

    def record(kernel: Any, grid: Any, arguments: dict[str, Any], config: Any) -> None:
        recorded.append((kernel, arguments, config))

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kernel_size = _KERNEL_SIZES[rank]
    params = NAParams(kernel_size, (1,) * rank, (1,) * rank, (False,) * rank, head_dim**-0.5)
    heads = 4
    query = tensor(2, *_SIZES[rank], heads, head_dim)
    additional = tensor(2, 16, heads, head_dim) if extra else None
    table = tensor(heads, *(2 * k - 1 for k in kernel_size), dtype=torch.float32) if rpb else None
    inputs = (query, query, query, additional, additional, table)
    with mock.patch.object(launch, "run", record):
        out, lse = launch.forward(*inputs, params)
        launch.backward(out, lse, *inputs, out, lse, params, (True, True, True, True))
        heads_first = query.movedim(-2, 1)
        window = (params.kernel_size, params.dilation, params.is_causal)
        weights = split_launch.scores(heads_first, heads_first, table, 0.0, window)
        split_launch.mix(weights, heads_first, window)
        split_launch.scatter(weights, heads_first, window)
    for kernel, arguments, config in recorded:
        tried = tiles.fitting(rank, arguments) if config is None else [config]
        for chosen in tried[:1] if first else tried:
            yield Start(kernel, arguments, chosen)


def compile_start(start: Start, arch: int) -> dict[str, Any]:
    """Compile for ``sm_<arch>`` with Triton's own ptxas."""
    function = start.kernel
    constants = {**start.arguments, **start.config.kwargs}
    if isinstance(function, triton.runtime.Heuristics):
        constants |= {name: rule(constants) for name, rule in function.values.items()}
        function = function.fn
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(function.params):
        value = constants[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constexprs[(index,)] = value
            continue
        fixed = not parameter.do_not_specialize
        signature[parameter.name] = _specialize((index,), value, constexprs, attributes, fixed)
    source = ASTSource(function, signature, constexprs, attributes)
    options = {"num_warps": start.config.num_warps, "num_stages": start.config.num_stages}
    options |= LAUNCH_OPTIONS
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = _assemble(compiled.asm["ptx"], arch)
    # The kernel for delta takes no query, but its output has the same rank and dtype.
    query = start.arguments["q_ptr" if "q_ptr" in start.arguments else "out_ptr"]
    of_query = {"dtype": str(query.dtype), "head_dim": query.shape[-1], "rank": query.dim() - 3}
    tile = {"tile": str(start.config.kwargs), **options}
    needed = {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared}
    return {"kernel": function.__name__, "arch": arch, **of_query, **tile, **needed}


def _specialize(
    path: tuple[int, ...],
    value: Any,
    constexprs: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    fixed: bool,
) -> Any:
    """Type of an argument, with the specialisation that a launch would derive from its value."""
    if isinstance(value, tuple):
        items = enumerate(value)
        return tuple(_specialize((*path, i), x, constexprs, attributes, fixed) for i, x in items)
    if value is None or (fixed and isinstance(value, int) and value == 1):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if fixed and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if abs(value) < 2**31 else "i64"


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and spilled bytes, as reported by ptxas."""
    target = re.search(r"\.target (\w+)", ptx)
    if target is None:
        raise ValueError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        # Since Triton 3.6 there is one for newer GPUs.
        ptxas = (get_ptxas(arch) if signature(get_ptxas).parameters else get_ptxas()).path
        command = [ptxas, "-v", f"--gpu-name={target[1]}", str(path), "-o", f"{folder}/kernel.o"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    if registers is None or not spilled:
        raise ValueError(f"ptxas reports no registers: {said!r}")
    return int(registers[1]), sum(map(int, spilled))


def main() -> None:
    """Write the report to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="default: 80 90")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rank", type=int, nargs="+", default=[2], choices=[1, 2, 3])
    parser.add_argument("--extra", action="store_true", help="with additional keys and values")
    parser.add_argument("--rpb", action="store_true", help="with a relative position bias")
    parser.add_argument("--first", action="store_true", help="only the tiles taken untuned")
    options = parser.parse_args()
    which = options.extra, options.rpb, options.first
    for arch, dtype, head_dim, rank in itertools.product(
        options.arch, options.dtype, options.head_dim, options.rank
    ):
        for start in starts(rank, head_dim, getattr(torch, dtype), *which):
            sys.stdout.write(json.dumps(compile_start(start, arch)) + "\n")


if __name__ == "__main__":
    main()
