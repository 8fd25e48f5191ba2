"""Models as files for other runtimes, torch.export and ONNX, and whether those give the same."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.cli.common import CommandError

__all__ = [
    "TOLERANCE",
    "Check",
    "check",
    "check_shapes",
    "need_onnx",
    "noise",
    "onnx_runner",
    "outputs",
    "program_runner",
    "replace_whole",
    "save_onnx",
    "save_program",
    "trace",
]

Run = Callable[[Tensor], Tensor]

# Greatest error, relative to the greatest output. Kernels sum in another order, which costs about
# 1e-6; what is wrong differs by far more.
TOLERANCE = 1e-4
# Where float32 itself is farther than that from float64, how many times as far a file may be from
# float32: both sum in an order of their own.
_TIMES_ROUNDING = 4

# Protobuf's limit is 2 GiB; larger weights lie in a file beside the graph.
_LARGEST_FILE = 1_900_000_000
# What open sizes are while a graph is traced, and nothing is computed: maps of several windows at
# every stage, whose sides differ and divide by nothing.
_TRACED_BATCH, _TRACED_SIZE = 3, (739, 997)


def trace(model: nn.Module, shape: Sequence[int], dynamic: bool) -> torch.export.ExportedProgram:
    """The graph of a model in eval mode, without gradients.

    Args:
        shape: (B, C, H, W) of the images that it takes.
        dynamic: leave batch, height and width open.

    Raises:
        CommandError: an operation cannot be traced; it says which.
    """
    from torch.fx.experimental import _config

    symbolic_config: Any = _config

    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    parameter = next(frozen.parameters())
    images = torch.zeros(
        *((_TRACED_BATCH, shape[1], *_TRACED_SIZE) if dynamic else shape),
        dtype=parameter.dtype,
        device=parameter.device,
    )
    axes = torch.export.Dim.DYNAMIC
    try:
        # What is asked of open sizes becomes a note in the graph, instead of a limit to the sizes
        # that have the same answer.
        with _silence(), symbolic_config.patch(backed_size_oblivious=dynamic), torch.no_grad():
            program = torch.export.export(
                frozen,
                (images,),
                dynamic_shapes=({0: axes, 2: axes, 3: axes},) if dynamic else None,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=dynamic,
            )
    except Exception as error:  # torch raises many kinds, some of them private
        raise CommandError(f"cannot be exported: {_reason(error)}") from error
    if dynamic:
        _lift_limits(program)
    return program


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a ``.pt2`` file, for ``torch.export.load`` and AOTInductor."""
    with _silence():
        torch.export.save(program, path)


def save_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write an ONNX file with the input ``image`` and the output ``output``.

    Beside it, ``<path>.data`` holds weights of more than 1.9 GB.

    Raises:
        CommandError: an operation that ONNX does not know, or onnx is not installed.
    """
    _need("onnx", "onnxscript")
    try:
        with _silence(), torch.no_grad():
            made = torch.onnx.export(
                _without_deform_conv(program),
                (),
                dynamo=True,
                verbose=False,
                input_names=["image"],
                output_names=["output"],
            )
    except Exception as error:  # torch.onnx raises many kinds, some of them private
        raise CommandError(f"cannot be written as ONNX: {_reason(error)}") from error
    assert made is not None
    _name_axes(made.model)
    made.model.metadata_props.update(metadata or {})
    weights = sum(t.nbytes for t in program.state_dict.values())
    made.save(path, external_data=weights > _LARGEST_FILE)


def _without_deform_conv(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same by operators that more runtimes know than ONNX's DeformConv."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    found: Any = {t for t in targets if str(t) == "torchvision.deform_conv2d.default"}
    if not found:
        return program
    return program.run_decompositions(dict.fromkeys(found, _sampled_deform_conv2d))


def _sampled_deform_conv2d(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    """``torchvision::deform_conv2d`` without masks and groups: each tap samples a map."""
    assert not use_mask and groups == offset_groups == 1
    height, width = x.shape[2:]
    top = torch.arange(offset.shape[2], device=x.device).view(-1, 1) * stride_h - pad_h
    left = torch.arange(offset.shape[3], device=x.device) * stride_w - pad_w
    taps = []
    for tap in range(weight.shape[2] * weight.shape[3]):
        down, right = divmod(tap, weight.shape[3])
        row = offset[:, 2 * tap] + (top + down * dilation_h)
        column = offset[:, 2 * tap + 1] + (left + right * dilation_w)
        # -1 and 1 are the outer edges of the map.
        grid = torch.stack(((2 * column + 1) / width - 1, (2 * row + 1) / height - 1), dim=-1)
        taps.append(F.grid_sample(x, grid, align_corners=False))
    flat = weight.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]
    return F.conv2d(torch.cat(taps, dim=1), flat, bias)


def program_runner(path: Path) -> Run:
    """What runs a ``.pt2`` file: images (B, C, H, W) → the model's output."""
    with _silence():
        module = torch.export.load(path).module()
    return module


def onnx_runner(path: Path, threads: int = 1) -> Run:
    """What runs an ONNX file in onnxruntime on the CPU: images (B, C, H, W) → its output.

    Raises:
        CommandError: onnxruntime is missing, or refuses the file.
    """
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions have no public base
        raise CommandError(f"onnxruntime refuses the file: {_reason(error)}") from error

    def run(images: Tensor) -> Tensor:
        try:
            (output,) = session.run(None, {"image": images.numpy()})
        except Exception as error:  # as above
            raise CommandError(
                f"onnxruntime fails at {tuple(images.shape)}: {_reason(error)}"
            ) from error
        return torch.from_numpy(np.asarray(output))

    return run


def check_shapes(shape: Sequence[int], dynamic: bool) -> list[tuple[int, ...]]:
    """Where to compare: at ``shape``, and if sizes are open at a small one and a larger, odd one.

    The three differ in batch, and two of them in what divides them.
    """
    batch, channels, height, width = shape
    if not dynamic:
        return [tuple(shape)]
    smaller = [max(32, math.ceil(s * share)) for s, share in ((height, 0.3), (width, 0.45))]
    larger = [math.ceil(height * 1.4) | 1, math.ceil(width * 1.2) | 1]
    return [tuple(shape), (batch + 2, channels, *smaller), (batch + 1, channels, *larger)]


@dataclass(frozen=True)
class Check:
    """How far a file is from its model at one size.

    Attributes:
        shape: of the images.
        error: the greatest difference, relative to the greatest output.
        allowed: ``TOLERANCE``; more where the model in float32 is that far from itself in float64.
    """

    shape: tuple[int, ...]
    error: float
    allowed: float


@torch.inference_mode()
def check(model: nn.Module, run: Run, shapes: Sequence[Sequence[int]]) -> Iterator[Check]:
    """Compare what ``run`` gives with what ``model`` gives, shape after shape.

    Raises:
        CommandError: ``run`` fails, or gives another shape.
    """
    for number, shape in enumerate(shapes):
        images = noise(shape, number)
        expected, got = outputs(model, run, images)
        error, allowed = _difference(got, expected), TOLERANCE
        if TOLERANCE < error < math.inf:
            exact = copy.deepcopy(model).double()(images.double())
            allowed = max(TOLERANCE, _TIMES_ROUNDING * _difference(expected, exact))
        yield Check(tuple(shape), error, allowed)


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal images, the same on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def outputs(model: nn.Module, run: Run, images: Tensor) -> tuple[Tensor, Tensor]:
    """What ``model`` and ``run`` give, in float64.

    Raises:
        CommandError: ``run`` fails, or gives another shape.
    """
    expected, got = model(images).double(), run(images).double()
    if got.shape != expected.shape:
        raise CommandError(
            f"at {tuple(images.shape)} the file gives {tuple(got.shape)}, the model "
            f"{tuple(expected.shape)}"
        )
    return expected, got


def _difference(value: Tensor, expected: Tensor) -> float:
    """The greatest, relative to the greatest of ``expected``; infinite where one is no number."""
    error = ((value - expected).abs().max() / expected.abs().max()).item()
    return error if math.isfinite(error) else math.inf


@contextlib.contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Where to write: a file of the same name, moved to ``path`` if the block succeeds.

    What is written beside it, under a longer name, moves along.

    Raises:
        CommandError: there is no such folder, or it cannot be written to.
    """
    folder = path.parent
    if not folder.is_dir():
        raise CommandError(f"there is no folder {folder} to write {path.name} to")
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=folder))
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield scratch / path.name
        for written in sorted(scratch.glob(f"{path.name}?*")):  # the data first, then the graph
            os.replace(written, folder / written.name)
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _lift_limits(program: torch.export.ExportedProgram) -> None:
    """Take what tracing noted on sizes out of the graph.

    The notes are on how memory is laid out (a batch "is not 1"), which is of no consequence, and
    would stop sizes at which the graph is right: whether it is, :func:`check` finds out.
    """
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    for symbol in program.range_constraints:
        program.range_constraints[symbol] = ValueRanges(1, int_oo)


def _name_axes(model: Any) -> None:
    """Give the open axes of an ONNX model the names that people look for."""
    names = dict(
        zip(
            (str(axis) for axis in model.graph.inputs[0].shape),
            ("batch", None, "height", "width"),
            strict=True,
        )
    )
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = onnx_ir.Shape(
            [
                axis if isinstance(axis, int) else names.get(str(axis)) or str(axis)
                for axis in value.shape
            ]
        )


def need_onnx() -> None:
    """Raise a CommandError where what writes and checks ONNX files is not installed."""
    _need("onnx", "onnxscript", "onnxruntime")


def _need(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise CommandError(
            f"{' and '.join(missing)} missing: pip install onnx onnxscript onnxruntime"
        )


def _reason(error: BaseException) -> str:
    """The line of an exception, or of what caused it, that says most."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporters warn and log of themselves; what matters to a user is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
