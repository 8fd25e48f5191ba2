"""Models in int8 as files: ONNX by onnxruntime's static quantisation, and safetensors for us.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import backbones
from backbones.cli.graphs import TOLERANCE, Run, difference, noise, outputs
from backbones.cli.predict import find_images
from backbones.common.console import silence
from backbones.common.errors import CommandError
from backbones.common.files import replacing_together, save_weights
from backbones.common.images import read_pixels
from backbones.common.keys import dump
from backbones.common.messages import first_line
from backbones.common.outputs import Kind
from backbones.common.resizing import Resizing
from backbones.core.inputs import channels_of
from backbones.core.loaded import Loaded, fuse, preprocessing
from backbones.fusing.precision import Precision

WANTED = "give a folder of images like those that the model will see"
# The expensive operators; norms, softmax and sums stay in float.
_QUANTIZED = ["Conv", "MatMul", "Gemm"]


class Agreement(NamedTuple):
    """How an int8 file compares with the model.

    Attributes:
        top1: share of the images with the same top-1 class; None without classes.
        decibels: signal-to-noise ratio of the outputs.
    """

    top1: float | None
    decibels: float

    def text(self, images: int) -> str:
        """A summary of the comparison on ``images`` images, without a full stop."""
        noise = f"signal to noise {self.decibels:.1f} dB"
        if self.top1 is None:
            return f"int8 vs. float: {noise}"
        return f"int8 agrees with float in {100 * self.top1:.1f} % of {images} predictions, {noise}"


def calibration_images(
    loaded: Loaded, folder: Path, count: int, size: tuple[int, int]
) -> list[Tensor]:
    """``count`` images (1, C, H, W), preprocessed.

    They are sampled evenly from the folder; unreadable ones are skipped.
    """
    channels = channels_of(loaded.model)
    config = {**preprocessing(loaded), "input_size": (channels, *size)}
    resize, mode = Resizing(config), "L" if channels == 1 else "RGB"
    try:
        paths = find_images([folder]).images
    except (CommandError, OSError) as error:
        raise CommandError(f"--calibration: {error}; {WANTED}") from error
    images: list[Tensor] = []
    for path in paths[:: max(1, len(paths) // count)][:count]:
        try:
            images.append(resize.normalise(resize(read_pixels(path, mode))[None]))
        except (OSError, ValueError, SyntaxError):
            continue
    if not images:
        raise CommandError(f"--calibration: no readable images in {folder}; {WANTED}")
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


def metadata_of(loaded: Loaded) -> dict[str, str]:
    """What a file says of its model: its name and, if known, those of its classes."""
    classes = {"classes": json.dumps(loaded.classes)} if loaded.classes else {}
    return {"model": loaded.name, **classes}


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


INT8 = Kind((".safetensors",), rb".{8}\{.*\.weight_scale\"")
"""The files of :func:`export_int8`."""

_BATCH = 16  # images to calibrate with at a time


def export_int8(
    loaded: Loaded,
    path: Path,
    size: tuple[int, int],
    images: Sequence[Tensor] | None = None,
    max_drop: float | None = None,
) -> None:
    """Write ``path`` if the model loaded from it computes the same, and print a report.

    Args:
        loaded: its model is fused in int8.
        images: (1, C, H, W) each, to calibrate with; None for ranges of each row.
    """
    exact, model = copy.deepcopy(loaded.model), loaded.model
    batches = None if images is None else torch.cat(list(images)).split(_BATCH)
    fuse(model, dtype=torch.int8, calibrate=batches, max_drop=max_drop)
    precision: Precision = model.precision
    if not precision.quantized:
        reason = precision.reason or f"no layer would gain from int8 here; {precision.summary()}"
        raise CommandError(f"{loaded.name}: {reason}")
    probe = noise((1, channels_of(exact), *size), 0)
    with replacing_together(path) as scratch:
        facts = metadata_of(loaded)
        if loaded.recipe is not None:
            facts["recipe"] = dump(loaded.recipe)
        save_weights(scratch, model.int8_state_dict(), facts)
        again = copy.deepcopy(exact)
        try:
            backbones.load_checkpoint(again, scratch)
        except backbones.CheckpointError as error:
            problem = str(error).replace(str(scratch), str(path))
            raise CommandError(f"{loaded.name}: {problem}; it was not written") from error
        wrong = difference(_run(again, probe), _run(model, probe))
        if wrong > TOLERANCE:
            raise CommandError(
                f"{loaded.name}: the file differs from the model by {wrong:.1e} of the maximum "
                "output; it was not written"
            )
    sys.stdout.write(f"  {precision.summary()}\n")
    if images is not None:
        found = agreement(exact, lambda image: _run(model, image), images)
        sys.stdout.write(f"  {found.text(len(images))}\n")
    megabytes = path.stat().st_size / 1e6
    sys.stdout.write(f"{path}: {loaded.name} in int8 for any batch and size, {megabytes:.1f} MB\n")


@torch.inference_mode()
def _run(model: Any, image: Tensor) -> Tensor:
    out: Tensor = model(image.to(next(model.parameters()).dtype))
    return out.float()
