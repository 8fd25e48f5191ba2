"""Compile the Triton kernels of neighborhood attention, without a GPU, for the resources they need.

Spills and shared memory are of one program; a thread has at most 255 registers.
"""

from __future__ import annotations

import re
import subprocess
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

from ops.neighborhood._geometry import Inputs, NAParams
from ops.neighborhood.triton import launch, tiles
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


def starts(rank: int, head_dim: int, dtype: torch.dtype, *, full: bool = False) -> Iterator[Start]:
    """Yield every kernel of a forward and backward call, with the tile that is used untuned.

    With ``full``, of a call with additional keys and a relative position bias.

    The launcher itself is run on tensors of the meta device, and the launches are recorded instead
    of executed.
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
    additional = tensor(2, 16, heads, head_dim) if full else None
    table = tensor(heads, *(2 * k - 1 for k in kernel_size), dtype=torch.float32) if full else None
    inputs = Inputs(query, query, query, additional, additional, table)
    with mock.patch.object(launch, "run", record):
        out, lse = launch.forward(inputs, params)
        launch.backward(out, lse, out, lse, inputs, params, (True,) * 6)
        heads_first = query.movedim(-2, 1)
        window = (params.kernel_size, params.dilation, params.is_causal)
        weights = launch.scores(heads_first, heads_first, table, 0.0, window)
        launch.mix(weights, heads_first, window)
        launch.scatter(weights, heads_first, window)
    for kernel, arguments, config in recorded:
        yield Start(kernel, arguments, config or tiles.fitting(rank, arguments)[0])


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
        signature[parameter.name] = _specialize(
            (index,), value, constexprs, attributes, fixed=not parameter.do_not_specialize
        )
    source = ASTSource(function, signature, constexprs, attributes)
    options = {"num_warps": start.config.num_warps, "num_stages": start.config.num_stages}
    options |= LAUNCH_OPTIONS
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = _assemble(compiled.asm["ptx"], arch)
    shared = compiled.metadata.shared
    return {
        "kernel": function.__name__,
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
    }


def _specialize(
    path: tuple[int, ...],
    value: Any,
    constexprs: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    *,
    fixed: bool,
) -> Any:
    """Type of an argument, with the specialisation that a launch would derive from its value."""
    if isinstance(value, tuple):
        return tuple(
            _specialize((*path, i), item, constexprs, attributes, fixed=fixed)
            for i, item in enumerate(value)
        )
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
