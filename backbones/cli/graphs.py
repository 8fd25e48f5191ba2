"""Export to torch.export and ONNX files, and comparison of these with the model."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import io
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.common.console import silence
from backbones.common.errors import CommandError
from backbones.common.messages import first_line

Run = Callable[[Tensor], Tensor]

# Maximum error, relative to the maximum output. Different summation orders cost about 1e-6; real
# errors are far larger.
TOLERANCE = 1e-4
# Where float32 differs from float64 by more than that, allow this multiple of the difference.
_TIMES_ROUNDING = 4

# Protobuf's limit is 2 GiB; larger weights are stored in a separate file.
_LARGEST_FILE = 1_900_000_000
# Elements of a constant that is compared with others: HAT's positions are 256 × 576.
_LARGEST_TABLE = 1 << 18
# Dynamic sizes while tracing: several windows per map at every stage, with different prime sides.
_TRACED_BATCH, _TRACED_SIZE = 3, (739, 997)


def trace(model: nn.Module, shape: Sequence[int], dynamic: bool) -> torch.export.ExportedProgram:
    """The graph of a model in eval mode; if ``dynamic``, for any batch size, height and width."""
    from torch.fx.experimental import _config

    symbolic_config: Any = _config
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    parameter = next(frozen.parameters())
    traced = (_TRACED_BATCH, shape[1], *_TRACED_SIZE) if dynamic else shape
    images = torch.zeros(*traced, dtype=parameter.dtype, device=parameter.device)
    axes = torch.export.Dim.DYNAMIC
    sizes = ({0: axes, 2: axes, 3: axes},) if dynamic else None
    try:
        with silence(), symbolic_config.patch(backed_size_oblivious=dynamic), torch.no_grad():
            program = _export(frozen, images, sizes)
    except Exception as error:  # torch raises many kinds, some of them private
        raise CommandError(f"cannot be exported: {_reason(error)}") from error
    if dynamic:
        _lift_limits(program)
    program.example_inputs = None  # zeros, which would be saved
    return program


def _export(module: nn.Module, images: Tensor, sizes: Any) -> torch.export.ExportedProgram:
    """Conditions on dynamic sizes become assertions in the graph instead of limits to the sizes."""
    arguments: dict[str, Any] = {"dynamic_shapes": sizes, "strict": False}
    option = "prefer_deferred_runtime_asserts_over_guards"
    if option in inspect.signature(torch.export.export).parameters:
        arguments[option] = sizes is not None
        return torch.export.export(module, (images,), **arguments)
    # torch 2.8 has the option only in the function behind torch.export.export.
    private: Any = importlib.import_module("torch.export._trace")
    arguments["allow_complex_guards_as_runtime_asserts"] = sizes is not None
    program: torch.export.ExportedProgram = private._export(
        module, (images,), **arguments, pre_dispatch=True
    )
    return program


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a ``.pt2`` file, for ``torch.export.load`` and AOTInductor."""
    file = io.BytesIO()  # torch's own writer hides I/O errors
    with silence():
        torch.export.save(program, file)
    path.write_bytes(file.getvalue())


def save_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write an ONNX file with the input ``image`` and the output ``output``.

    Weights of more than 1.9 GB are stored in ``<path>.data``. Equal constants are stored once.
    """
    from onnx_ir.passes.common import DeduplicateInitializersPass

    try:
        with silence(), _linear_time(), torch.no_grad():
            made: Any = torch.onnx.export(
                with_common_operators(program),
                (),
                dynamo=True,
                verbose=False,
                input_names=["image"],
                output_names=["output"],
                custom_translation_table=_size_arithmetic(),
            )
    except Exception as error:  # torch.onnx raises many kinds, some of them private
        raise CommandError(f"cannot be written as ONNX: {_reason(error)}") from error
    DeduplicateInitializersPass(_LARGEST_TABLE)(made.model)
    _name_axes(made.model)
    made.model.metadata_props.update(metadata or {})
    weights = sum(t.nbytes for t in program.state_dict.values())
    made.save(path, external_data=weights > _LARGEST_FILE)


def _size_arithmetic() -> dict[Any, Callable[..., Any]]:
    """Translations of quotients of sizes to float64, as in Python; torch's take float32."""
    from onnx_ir import DataType
    from onnxscript import opset18

    def to_double(size: Any) -> Any:
        return opset18.Cast(size, to=DataType.DOUBLE)

    def quotient(dividend: Any, divisor: Any) -> Any:
        return opset18.Div(to_double(dividend), to_double(divisor))

    return {operator.truediv: quotient, torch.sym_float: to_double}


@contextlib.contextmanager
def _linear_time() -> Iterator[None]:
    """Disable the one rule of onnxscript's optimiser with quadratic time.

    It merges two Slices that halve the last axis into a Split, which saves almost nothing at run
    time, but searches the whole graph at every node: for minutes in HAT-S.
    """
    from onnxscript.rewriter.rules import common

    rule: Any = common.slice_split_rule
    rule.try_rewrite = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del rule.try_rewrite


def program_runner(path: Path) -> Run:
    """A function that runs a ``.pt2`` file: images (B, C, H, W) → the model's output."""
    with silence():
        module = torch.export.load(path).module()
    return module


def onnx_runner(path: Path, threads: int = 1) -> Run:
    """A function that runs an ONNX file in onnxruntime on the CPU: images (B, C, H, W) → output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions have no public base
        raise CommandError(f"onnxruntime rejects the file: {_reason(error)}") from error

    def run(images: Tensor) -> Tensor:
        try:
            (output,) = session.run(None, {"image": images.numpy()})
        except Exception as error:  # as above
            where = tuple(images.shape)
            raise CommandError(f"onnxruntime fails at {where}: {_reason(error)}") from error
        return torch.from_numpy(np.asarray(output))

    return run


def check_shapes(shape: Sequence[int], dynamic: bool) -> list[tuple[int, ...]]:
    """The shapes to compare at; if dynamic, also a smaller and a larger, odd one."""
    batch, channels, height, width = shape
    if not dynamic:
        return [tuple(shape)]
    smaller = [max(32, math.ceil(s * share)) for s, share in ((height, 0.3), (width, 0.45))]
    larger = [math.ceil(height * 1.4) | 1, math.ceil(width * 1.2) | 1]
    return [tuple(shape), (batch + 2, channels, *smaller), (batch + 1, channels, *larger)]


class Check(NamedTuple):
    """The maximum error of a file at one size, relative to the maximum output.

    ``allowed`` is ``TOLERANCE``, or more where float32 itself differs that much from float64.
    """

    shape: tuple[int, ...]
    error: float
    allowed: float


@torch.inference_mode()
def check(model: nn.Module, run: Run, shapes: Sequence[Sequence[int]]) -> Iterator[Check]:
    """Compare the outputs of ``run`` and ``model`` for each shape."""
    for number, shape in enumerate(shapes):
        images = noise(shape, number)
        expected, got = outputs(model, run, images)
        error, allowed = difference(got, expected), TOLERANCE
        if TOLERANCE < error < math.inf:
            exact = copy.deepcopy(model).double()(images.double())
            allowed = max(TOLERANCE, _TIMES_ROUNDING * difference(expected, exact))
        yield Check(tuple(shape), error, allowed)


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal images, the same on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def outputs(model: nn.Module, run: Run, images: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of ``model`` and ``run``, in float64."""
    expected = model(images).double()
    if not expected.isfinite().all():
        raise CommandError(f"at {tuple(images.shape)} the model's output is not finite")
    got = run(images).double()
    if got.shape != expected.shape:
        raise CommandError(
            f"at {tuple(images.shape)} the file returns {tuple(got.shape)}, the model "
            f"{tuple(expected.shape)}"
        )
    return expected, got


def difference(value: Tensor, expected: Tensor) -> float:
    """Maximum difference relative to the maximum of ``expected``; infinite for NaN."""
    error, scale = (value - expected).abs().max().item(), expected.abs().max().item()
    error = error / scale if scale else error and math.inf
    return error if math.isfinite(error) else math.inf


def _lift_limits(program: torch.export.ExportedProgram) -> None:
    """Remove the assertions on sizes that tracing put into the graph.

    They concern memory layout (a batch "is not 1"), are irrelevant, and would reject sizes for
    which the graph is correct, as :func:`check` verifies.
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
    """Name the dynamic axes of an ONNX model: batch, height, width."""
    import onnx_ir

    batch, _, height, width = map(str, model.graph.inputs[0].shape)
    names: dict[Any, str] = {batch: "batch", height: "height", width: "width"}
    for value in (*model.graph.inputs, *model.graph.outputs):
        axes = [axis if isinstance(axis, int) else str(axis) for axis in value.shape]
        value.shape = onnx_ir.Shape([names.get(axis, axis) for axis in axes])


def require_onnx() -> None:
    """Raise a CommandError if packages for ONNX are not installed."""
    packages = ("onnx", "onnxscript", "onnxruntime")
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise CommandError(f"{' and '.join(missing)} missing: pip install {' '.join(packages)}")


def _reason(error: BaseException) -> str:
    """The first line of an exception's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def with_common_operators(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program in operators that more runtimes support than DeformConv.

    On torch 2.8 this includes average pooling to one pixel: for maps in NHWC, its translation keeps
    the strides by operators on sequences, which OpenVINO lacks.
    """
    table: dict[str, Callable[..., Tensor]] = {
        "torchvision.deform_conv2d.default": sampled_deform_conv2d
    }
    if torch.__version__ < "2.9":  # as versions, not as text
        table["aten.adaptive_avg_pool2d.default"] = _mean_pool
    targets: Any = {node.target for node in program.graph.nodes if node.op == "call_function"}
    replaced = {target: table[str(target)] for target in targets if str(target) in table}
    return program.run_decompositions(replaced) if replaced else program


def _mean_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(size) == (1, 1):
        return x.mean((2, 3), keepdim=True)
    return torch.ops.aten._adaptive_avg_pool2d(x, size)


def sampled_deform_conv2d(
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
    """``torchvision::deform_conv2d`` without masks and groups, by one grid_sample per tap."""
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
