"""Static int8 quantisation of ONNX files by onnxruntime, and its accuracy.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn

from backbones.cli.graphs import Run, outputs
from backbones.cli.predict import find_images, read_pixels
from backbones.common.console import silence
from backbones.common.errors import CommandError
from backbones.common.messages import first_line
from backbones.common.resizing import Resizing
from backbones.core.inputs import channels_of
from backbones.core.loaded import Loaded, preprocessing

_WANTED = "give a folder of images like those that the model will see"
# The expensive operators; norms, softmax and sums stay in float.
_QUANTIZED = ["Conv", "MatMul", "Gemm"]


@dataclass(frozen=True)
class Agreement:
    """How an int8 file compares with the model.

    Attributes:
        top1: share of the images with the same top-1 class; None without classes.
        decibels: signal-to-noise ratio of the outputs.
    """

    top1: float | None
    decibels: float

    def text(self, images: int) -> str:
        """A line without a full stop about that many images."""
        noise = f"signal to noise {self.decibels:.1f} dB"
        if self.top1 is None:
            return f"int8 vs. float: {noise}"
        return f"int8 agrees with float in {100 * self.top1:.1f} % of {images} predictions, {noise}"


def check_options(int8: bool, folder: Path | None, count: int, fixed_ranges: bool = True) -> None:
    """Check ``--int8``, ``--calibration`` and ``--calibration-images`` for consistency.

    Args:
        fixed_ranges: whether the format needs them, and so images.
    """
    if int8 and folder is None and fixed_ranges:
        raise CommandError(f"--int8 needs --calibration FOLDER; {_WANTED}")
    if folder is not None and not int8:
        raise CommandError("--calibration requires --int8; add it, or omit --calibration")
    if count < 1:
        raise CommandError(f"--calibration-images must be 1 or more, got {count}")


def calibration_images(
    loaded: Loaded, folder: Path, count: int, size: tuple[int, int]
) -> list[Tensor]:
    """``count`` images (1, C, H, W), preprocessed.

    They are sampled evenly from the folder; unreadable ones are skipped.
    """
    channels = channels_of(loaded.model)
    config = {**preprocessing(loaded), "input_size": (channels, *size)}
    resize = Resizing(config)
    try:
        paths = find_images([folder]).images
    except (CommandError, OSError) as error:
        raise CommandError(f"--calibration: {error}; {_WANTED}") from error
    images: list[Tensor] = []
    for path in paths[:: max(1, len(paths) // count)][:count]:
        try:
            images.append(resize.normalise(resize(read_pixels(path, channels == 1))[None]))
        except (OSError, ValueError, SyntaxError):
            continue
    if not images:
        raise CommandError(f"--calibration: no readable images in {folder}; {_WANTED}")
    return images


def quantize(path: Path, images: Sequence[Tensor]) -> None:
    """Quantise an ONNX file in place.

    Weights become per-channel int8, activations uint8 with ranges calibrated on the images.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name(f".prepared.{path.name}")
    quantized = path.with_name(f".int8.{path.name}")
    feed = iter([{"image": image.numpy()} for image in images])
    folder, tempfile.tempdir = tempfile.tempdir, str(path.parent)  # for onnxruntime's own files
    try:
        with silence():
            quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(quantized),
                SimpleNamespace(get_next=lambda: next(feed, None)),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_QUANTIZED,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
    except Exception as error:  # onnxruntime's have no public base
        raise CommandError(f"cannot be quantised: {first_line(error)}") from error
    finally:
        tempfile.tempdir = folder
        prepared.unlink(missing_ok=True)
    os.replace(quantized, path)


def agreement(model: nn.Module, run: Run, images: Sequence[Tensor]) -> Agreement:
    """How the outputs of ``run`` compare with the model's on ``images``."""
    same, signal, noise = 0, 0.0, 0.0
    classifies = True
    for image in images:
        expected, got = outputs(model, run, image)
        if not got.isfinite().all():
            raise CommandError(f"at {tuple(image.shape)} the int8 file's output is not finite")
        signal += expected.square().sum().item()
        noise += (expected - got).square().sum().item()
        classifies = expected.ndim == 2 and expected.shape[1] > 1
        if classifies:
            same += int(expected.argmax(1).eq(got.argmax(1)).sum())
    decibels = 10 * math.log10(signal / noise) if noise else math.inf
    return Agreement(same / len(images) if classifies else None, decibels)
