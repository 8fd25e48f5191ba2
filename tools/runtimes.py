"""Our models in other runtimes, as contenders of ``benchmark.py``: ONNX Runtime and OpenVINO.

Each runs the ONNX file that ``vision-backbones export --fused`` would write: with folded norms and
branches, and the runtime's own kernels.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from backbones.cli import graphs as exporting

__all__ = ["RUNTIMES", "Exported", "openvino_core"]

Run = Callable[[Tensor], Tensor]


class Exported(nn.Module):
    """A model run by another runtime, in eval mode only: (B, 3, H, W) → its output.

    It is exported at the first call, for that input shape and torch's current number of threads.

    Args:
        name: of the model.
        start: function from an ONNX file and a number of threads to a function that runs it.
    """

    def __init__(self, name: str, start: Callable[[Path, int], Run]) -> None:
        super().__init__()
        self._name, self._start = name, start
        self._run: Run | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            raise NotImplementedError("other runtimes do not train")
        if self._run is None:
            path = _exported(self._name, tuple(images.shape))
            self._run = self._start(path, torch.get_num_threads())
        return self._run(images)


@functools.cache
def _folder() -> Path:
    """A folder that exists until the process ends, even if this module is unloaded earlier."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.lru_cache(maxsize=1)  # runtimes read the file at once, so the next may replace it
def _exported(name: str, shape: tuple[int, ...]) -> Path:
    path = _folder() / "model.onnx"
    torch.manual_seed(0)
    model = backbones.fuse(backbones.create_model(name).eval(), channels_last=False)
    exporting.save_onnx(exporting.trace(model, shape, dynamic=False), path)
    return path


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


def _openvino(precision: str, path: Path, threads: int) -> Run:
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = openvino_core().compile_model(str(path), "CPU", options).create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({0: images.numpy()}, share_inputs=True)[0].copy())

    return run


# By label. OpenVINO's inputs and outputs are float32 even if it computes in bfloat16.
RUNTIMES: dict[str, Callable[[str], nn.Module]] = {
    "onnxruntime": lambda name: Exported(name, exporting.onnx_runner),
    "openvino": lambda name: Exported(name, functools.partial(_openvino, "f32")),
    "openvino_bf16": lambda name: Exported(name, functools.partial(_openvino, "bf16")),
}
