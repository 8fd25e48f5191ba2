"""Our models quantised by other toolkits, as contenders of ``int8_peers.py``.

Each toolkit gets the model with folded norms and branches, in float32, and the same calibration
images: NNCF's post-training quantisation for OpenVINO, ONNX Runtime's static (QDQ) and dynamic
quantisation, torch's PT2E with the x86 quantiser, and torchao's dynamic linear layers; the latter
two run in ``torch.compile`` with frozen weights. Everything else is left at the toolkits' defaults.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from runtimes import openvino_core
from torch import Tensor, nn

import backbones
from backbones.cli import graphs as exporting

__all__ = ["PACKAGES", "TOOLKITS", "Contender", "Run", "fused"]

Run = Callable[[Tensor], Tensor]


class Contender(NamedTuple):
    """A quantised model.

    Attributes:
        start: function from a number of threads to one that runs it, (B, C, H, W) → output.
        size: bytes on disk.
    """

    start: Callable[[int], Run]
    size: int


def fused(
    model: nn.Module, dtype: torch.dtype | None = None, images: Sequence[Tensor] | None = None
) -> Contender:
    """Ours: float32, ``torch.bfloat16``, or ``torch.int8``, calibrated if there are images.

    Its size is that of its weights as safetensors.
    """
    model = copy.deepcopy(model)
    given = {"calibrate": images} if dtype == torch.int8 and images is not None else {}
    backbones.fuse(model, dtype=dtype, **given)
    kept = next(model.parameters()).dtype
    in_bytes = model.precision is not None and model.precision.quantized
    state = model.int8_state_dict() if in_bytes else model.state_dict()
    size = len(safetensors.torch.save({name: t.contiguous() for name, t in state.items()}))

    def start(threads: int) -> Run:
        return lambda images: model(images.to(kept)).float()

    return Contender(start, size)


def nncf(model: nn.Module, images: Sequence[Tensor], folder: Path) -> Contender:
    """OpenVINO with NNCF's post-training quantisation; transformers' scheme if there is softmax."""
    with _quiet():
        import nncf as toolkit
        import openvino

    core = openvino_core()
    source = _onnx(model, images, folder)
    network = core.read_model(str(source))
    attends = any(node.get_type_name() == "Softmax" for node in network.get_ops())
    with _quiet():
        quantized = toolkit.quantize(
            network,
            toolkit.Dataset([image.numpy() for image in images]),
            subset_size=len(images),
            model_type=toolkit.ModelType.TRANSFORMER if attends else None,
        )
    path = folder / "nncf.xml"
    openvino.save_model(quantized, str(path), compress_to_fp16=False)

    def start(threads: int) -> Run:
        options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        request = core.compile_model(str(path), "CPU", options).create_infer_request()

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(request.infer({0: images.numpy()}, share_inputs=True)[0].copy())

        return run

    return Contender(start, path.stat().st_size + path.with_suffix(".bin").stat().st_size)


class _Reader:
    """Calibration images as ONNX Runtime reads them."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {"image": image.numpy()}


def onnx_static(model: nn.Module, images: Sequence[Tensor], folder: Path) -> Contender:
    """ONNX Runtime, QDQ: activations per tensor in unsigned, weights per channel in signed bytes.

    Batch norms are folded already; its own preparation infers shapes and fuses nodes.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static, shape_inference

    source, prepared = _onnx(model, images, folder), folder / "prepared.onnx"
    path = folder / "static.onnx"
    with _quiet():
        shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return _of_onnx(path)


def onnx_dynamic(model: nn.Module, images: Sequence[Tensor], folder: Path) -> Contender:
    """ONNX Runtime, dynamic, with unsigned weights, as its convolutions take no signed ones."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "dynamic.onnx"
    with _quiet():
        source = str(_onnx(model, images, folder))
        quantize_dynamic(source, str(path), per_channel=True, weight_type=QuantType.QUInt8)
    return _of_onnx(path)


def _of_onnx(path: Path) -> Contender:
    return Contender(lambda threads: exporting.onnx_runner(path, threads), path.stat().st_size)


def _onnx(model: nn.Module, images: Sequence[Tensor], folder: Path) -> Path:
    """The model's export at the images' shape, written once."""
    path = folder / "float.onnx"
    if not path.exists():
        exporting.save_onnx(exporting.trace(model, images[0].shape, dynamic=False), path)
    return path


def pt2e(model: nn.Module, images: Sequence[Tensor], folder: Path) -> Contender:
    """torch's PT2E with the x86 quantiser's default scheme, run by inductor.

    The quantiser rejects a module that is called twice, such as an activation, unless the model is
    exported by dynamo (strict), which in turn cannot trace all models.
    """
    file = io.BytesIO()
    with _quiet(), torch.no_grad():
        try:
            graph = _pt2e_graph(model, images, strict=True)
        except Exception:  # of many kinds
            graph = _pt2e_graph(model, images, strict=False)
        torch.export.save(torch.export.export(graph, (images[0],)), file)
    return Contender(functools.partial(_compiled, graph), file.getbuffer().nbytes)


def _pt2e_graph(model: nn.Module, images: Sequence[Tensor], strict: bool) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    graph = torch.export.export(model, (images[0],), strict=strict).module()
    graph = prepare_pt2e(graph, quantizer)
    for image in images:
        graph(image)
    return convert_pt2e(graph)


def torchao(model: nn.Module, images: Sequence[Tensor], folder: Path) -> Contender:
    """torchao's linear layers with dynamic activations, run by inductor. It takes no images."""
    with _quiet():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    if not any(isinstance(layer, nn.Linear) for layer in model.modules()):
        raise ValueError("torchao quantises nn.Linear, of which this model has none")
    file = io.BytesIO()
    with _quiet():
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        torch.save(model.state_dict(), file)
    return Contender(functools.partial(_compiled, model), file.getbuffer().nbytes)


@torch.no_grad()
def _compiled(model: nn.Module, threads: int) -> Run:
    """Compiled at the first call, for torch's current number of threads."""
    import torch._inductor.config as config

    compiled = torch.compile(model, dynamic=False)

    @torch.no_grad()  # freezing requires it
    def run(images: Tensor) -> Tensor:
        with config.patch(freezing=True), _quiet():
            return compiled(images)

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the toolkits' warnings and progress bars; what fails raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# By label. Each takes a folded float32 model, calibration images of the shape it will run at, and
# a folder for its files, which is kept as long as the contender.
TOOLKITS: dict[str, Callable[[nn.Module, Sequence[Tensor], Path], Contender]] = {
    "openvino_nncf": nncf,
    "onnxruntime_static": onnx_static,
    "onnxruntime_dynamic": onnx_dynamic,
    "pt2e_x86": pt2e,
    "torchao_dynamic": torchao,
}
PACKAGES = ("nncf", "openvino", "onnxruntime", "torchao")
