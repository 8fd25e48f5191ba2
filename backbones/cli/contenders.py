"""The contenders of ``vision-backbones benchmark``: libraries, runtimes, the user's code.

The runtimes run the ONNX file that ``vision-backbones export --fused`` would write: with folded
norms and branches, and the runtime's own kernels.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import runpy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import backbones
from backbones.cli import graphs
from backbones.common.errors import CommandError
from backbones.common.messages import first_line

BIRDER_NAMES = {
    **{f"efficientvit_m{i}": f"efficientvit_msft_m{i}" for i in range(6)},
    **{f"inception_next_{a}": f"inception_next_{a[0]}" for a in ("atto", "tiny", "small", "base")},
    **{f"biformer_{a}": f"biformer_{a[0]}" for a in ("tiny", "small", "base")},
    **{f"litv2_{a}": f"lit_v2_{a}" for a in ("s", "m", "b")},
}

Create = Callable[[str], nn.Module | None]
Run = Callable[[Tensor], Tensor]
# A function from a number of threads to one that runs the model, and its bytes on disk.
Prepared = tuple[Callable[[int], Run], int]


class CannotRunError(RuntimeError):
    """A contender cannot run this measurement; the message says why."""


def reason(error: BaseException) -> str:
    """Why something cannot run, in one line."""
    if isinstance(error, CannotRunError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


def is_timms(name: str) -> bool:
    """Whether timm itself has a model of that name, even if we have one, too."""
    known = timm.models.is_model(name)
    return known and timm.models.model_entrypoint(name).__module__.startswith("timm.")


def create_timm(name: str) -> nn.Module | None:
    """timm's own model of that name."""
    model: nn.Module | None = timm.create_model(name) if is_timms(name) else None
    return model


def create_birder(name: str) -> nn.Module | None:
    """The model of the library ``birder``, https://pypi.org/project/birder."""
    from birder.model_registry import registry

    theirs = BIRDER_NAMES.get(name, name)
    if theirs not in registry.list_models():
        return None
    model: nn.Module = registry.net_factory(theirs, 1000)
    return model


class Runtime(nn.Module):
    """A model run by another runtime, in eval mode only: (B, C, H, W) → its output.

    It is prepared at the first call, for that input's shape, and started with torch's current
    number of threads. A call that fails raises :class:`CannotRunError`.
    """

    def __init__(self, prepare: Callable[[str, tuple[int, ...]], Prepared], name: str) -> None:
        super().__init__()
        self._prepare, self._name = prepare, name
        self._run: Run | None = None
        self.bytes_on_disk: int | None = None  # before the first call

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            raise NotImplementedError("other runtimes cannot train")
        try:
            if self._run is None:
                start, self.bytes_on_disk = self._prepare(self._name, tuple(images.shape))
                self._run = start(torch.get_num_threads())
            return self._run(images)
        except Exception as error:  # the runtimes' exceptions have no common base
            raise CannotRunError(reason(error)) from error


@functools.cache
def scratch_folder() -> Path:
    """A folder that exists until the process ends, even if this module is unloaded earlier."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.lru_cache(maxsize=1)  # runtimes read the file at once, so the next may replace it
def _exported(name: str, shape: tuple[int, ...]) -> Path:
    path = scratch_folder() / "model.onnx"
    torch.manual_seed(0)
    model = backbones.fuse(backbones.create_model(name).eval(), channels_last=False)
    graphs.save_onnx(graphs.trace(model, shape, dynamic=False), path)
    return path


def _by_export(runner: Callable[[Path, int], Run], name: str, shape: tuple[int, ...]) -> Prepared:
    path = _exported(name, shape)
    return functools.partial(runner, path), path.stat().st_size


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's core, kept until the process ends, even if this module is unloaded earlier.

    OpenVINO gives the thread that first queries the CPU an alternate signal stack. When the last
    reference to the core is released, it unmaps that stack, in whatever thread this happens; the
    first thread then dies silently at the next signal that Python handles.
    """
    import openvino

    core = openvino.Core()
    core.get_versions("CPU")
    atexit.register(lambda: core)
    return core


def openvino_runner(options: Mapping[str, Any], path: Path, threads: int) -> Run:
    """A function that runs a file with OpenVINO, compiled with further ``options``."""
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, **options}
    request = openvino_core().compile_model(str(path), "CPU", settings).create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({0: images.numpy()}, share_inputs=True)[0].copy())

    return run


# OpenVINO's inputs and outputs are float32 even if it computes in bfloat16.
_RUNNERS: dict[str, Callable[[Path, int], Run]] = {
    "onnxruntime": graphs.onnx_runner,
    "openvino": functools.partial(openvino_runner, {"INFERENCE_PRECISION_HINT": "f32"}),
    "openvino_bf16": functools.partial(openvino_runner, {"INFERENCE_PRECISION_HINT": "bf16"}),
}
MODELS: dict[str, Create] = {
    "timm": create_timm,
    "birder": create_birder,
    **{
        label: functools.partial(Runtime, functools.partial(_by_export, runner))
        for label, runner in _RUNNERS.items()
    },
}


def contender(name: str, known: Mapping[str, Create] = MODELS) -> tuple[str, Create]:
    """Label and factory of a value of ``--against``: a known one, a module, or a Python file."""
    if name in known:
        return name, known[name]
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise CommandError(f"--against: there is no file {path}")
        found, label = runpy.run_path(str(path)), path.stem
    else:
        try:
            found, label = vars(importlib.import_module(name)), name
        except (ModuleNotFoundError, TypeError, ValueError) as error:  # "", ".x"
            raise CommandError(f"--against: {error}") from error
    if "create_model" not in found:
        raise CommandError(f"--against: {name} has no function create_model(name)")
    return label, found["create_model"]
