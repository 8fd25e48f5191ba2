"""Models as files for other runtimes, torch.export and ONNX, and whether those give the same."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones.cli.alike import Group, fill_in, take_out
from backbones.cli.common import CommandError
from backbones.cli.deform import without_deform_conv

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
    return _trace(_frozen(model), shape, dynamic)


@dataclass(frozen=True)
class TracedGroup:
    """The graph that HAT's groups have in common.

    Attributes:
        program: takes a map, and the weights of a group.
        weights: of each.
    """

    program: torch.export.ExportedProgram
    weights: Sequence[dict[str, Tensor]]


def trace_for_onnx(
    model: nn.Module, shape: Sequence[int], dynamic: bool
) -> tuple[torch.export.ExportedProgram, TracedGroup | None]:
    """As :func:`trace`, what :func:`save_onnx` takes: groups that are alike are traced once."""
    frozen = _frozen(model)
    group = take_out(frozen)
    program = _trace(frozen, shape, dynamic)
    return program, None if group is None else _trace_group(group, shape, dynamic)


def _frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _trace(frozen: nn.Module, shape: Sequence[int], dynamic: bool) -> torch.export.ExportedProgram:
    parameter = next(frozen.parameters())
    images = torch.zeros(
        *((_TRACED_BATCH, shape[1], *_TRACED_SIZE) if dynamic else shape),
        dtype=parameter.dtype,
        device=parameter.device,
    )
    axes = torch.export.Dim.DYNAMIC
    return _export(frozen, (images,), ({0: axes, 2: axes, 3: axes},) if dynamic else None)


def _trace_group(group: Group, shape: Sequence[int], dynamic: bool) -> TracedGroup:
    """``shape`` is of the images."""
    weights, window = group.weights[0], group.window_size
    batch, sides = (_TRACED_BATCH, _TRACED_SIZE) if dynamic else (shape[0], shape[2:])
    height, width = (math.ceil(side / window) * window for side in sides)
    parameter = next(iter(weights.values()))
    x = torch.zeros(batch, group.dim, height, width, dtype=parameter.dtype, device=parameter.device)
    axes: Any = None
    if dynamic:
        rows, columns = (torch.export.Dim(name, min=1) for name in ("rows", "columns"))
        of_map = {0: torch.export.Dim.DYNAMIC, 2: window * rows, 3: window * columns}
        axes = (of_map, dict.fromkeys(weights, {}))
    return TracedGroup(_export(group, (x, weights), axes), group.weights)


def _export(module: nn.Module, inputs: tuple[Any, ...], axes: Any) -> torch.export.ExportedProgram:
    """torch.export; ``axes`` says which are open, as there, or None if none is."""
    from torch.fx.experimental import _config

    symbolic_config: Any = _config

    dynamic = axes is not None
    try:
        # What is asked of open sizes becomes a note in the graph, instead of a limit to the sizes
        # that have the same answer.
        with _silence(), symbolic_config.patch(backed_size_oblivious=dynamic), torch.no_grad():
            program = torch.export.export(
                module,
                inputs,
                dynamic_shapes=axes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=dynamic,
            )
    except Exception as error:  # torch raises many kinds, some of them private
        raise CommandError(f"cannot be exported: {_reason(error)}") from error
    if dynamic:
        _lift_limits(program)
    program.example_inputs = None  # zeros, which a file would hold
    return program


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a ``.pt2`` file, for ``torch.export.load`` and AOTInductor."""
    file = io.BytesIO()  # torch's own writer hides what the disk says
    with _silence():
        torch.export.save(program, file)
    path.write_bytes(file.getbuffer())


def save_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: dict[str, str] | None = None,
    group: TracedGroup | None = None,
) -> None:
    """Write an ONNX file with the input ``image`` and the output ``output``.

    Beside it, ``<path>.data`` holds weights of more than 1.9 GB.

    Args:
        program, group: of :func:`trace_for_onnx`, or the program alone of :func:`trace`.

    Raises:
        CommandError: an operation that ONNX does not know, or onnx is not installed.
    """
    _need("onnx", "onnxscript")
    made = _onnx(program, input_names=["image"], output_names=["output"])
    tensors = list(program.state_dict.values())
    if group is not None:
        fill_in(made.model, _onnx(group.program).model, group.weights)
        tensors += [tensor for weights in group.weights for tensor in weights.values()]
    _name_axes(made.model)
    made.model.metadata_props.update(metadata or {})
    made.save(path, external_data=sum(t.nbytes for t in tensors) > _LARGEST_FILE)


def _onnx(program: torch.export.ExportedProgram, **names: Any) -> Any:
    """torch.onnx's translation of a graph."""
    try:
        with _silence(), _linear_time(), torch.no_grad():
            return torch.onnx.export(
                without_deform_conv(program), (), dynamo=True, verbose=False, **names
            )
    except Exception as error:  # torch.onnx raises many kinds, some of them private
        raise CommandError(f"cannot be written as ONNX: {_reason(error)}") from error


@contextlib.contextmanager
def _linear_time() -> Iterator[None]:
    """Leave out the one rule of onnxscript's optimiser that looks at pairs of nodes.

    It makes a Split of two Slices that halve the last axis, which saves a runtime nothing to speak
    of, and searches the whole graph for the second one at every node: in HAT-S, for minutes.
    """
    from onnxscript.rewriter.rules import common

    rule: Any = common.slice_split_rule
    rule.try_rewrite = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del rule.try_rewrite


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
