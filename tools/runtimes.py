"""Our models in other runtimes, as contenders of ``benchmark.py``: ONNX Runtime and OpenVINO.

Each runs the ONNX file that ``vision-backbones export --fused`` would write: norms and branches are
folded, kernels are the runtime's.
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
from backbones.cli import exporting

__all__ = ["RUNTIMES", "Exported"]

Run = Callable[[Tensor], Tensor]


class Exported(nn.Module):
    """A model that another runtime runs, in eval mode only: (B, 3, H, W) → its output.

    It is exported when it is first called, for inputs of that shape and as many threads as torch
    has then.

    Args:
        name: of the model.
        start: from an ONNX file and a number of threads to what runs it.
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
    """For files as long as the process runs, even where this module is forgotten sooner."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.lru_cache(maxsize=1)  # runtimes read the file at once, the next one takes its place
def _exported(name: str, shape: tuple[int, ...]) -> Path:
    path = _folder() / "model.onnx"
    torch.manual_seed(0)
    model = backbones.create_model(name).eval().fuse(channels_last=False)
    exporting.save_onnx(exporting.trace(model, shape, dynamic=False), path)
    return path


@functools.cache
def _openvino_core() -> Any:
    """For as long as the process runs, even where this module is forgotten sooner.

    OpenVINO gives the thread that first asks it for the CPU another stack for signals. When the
    last that refers to it goes, it unmaps that stack in whichever thread this happens, and the
    first thread dies, without a word, at the next signal that Python handles.
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
    request = _openvino_core().compile_model(str(path), "CPU", options).create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({0: images.numpy()}, share_inputs=True)[0].copy())

    return run


# By their labels. OpenVINO takes and gives float32 also where it computes in bfloat16.
RUNTIMES: dict[str, Callable[[str], nn.Module]] = {
    "onnxruntime": lambda name: Exported(name, exporting.onnx_runner),
    "openvino": lambda name: Exported(name, functools.partial(_openvino, "f32")),
    "openvino_bf16": lambda name: Exported(name, functools.partial(_openvino, "bf16")),
}
