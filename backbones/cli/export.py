"""``vision-backbones export``: write a model as an ONNX or torch.export file and check it.

The file is compared with the model, at three sizes if sizes are dynamic. A model in int8 can also
be written as safetensors, for the library itself.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from backbones.cli import graphs
from backbones.cli.common import add_size_argument, two_sides
from backbones.cli.predict import find_images
from backbones.common.arguments import FILE, nonempty_path, real, whole
from backbones.common.console import silence
from backbones.common.errors import CommandError
from backbones.common.files import replacing_together, save_weights
from backbones.common.keys import dump
from backbones.common.messages import first_line
from backbones.common.outputs import ONNX, PT2, Kind, add_overwrite, require_writable
from backbones.common.resizing import Resizing
from backbones.common.signals import exit_on_signals
from backbones.core.base import StagedBackbone
from backbones.core.inputs import channels_of, require_size
from backbones.core.loaded import Loaded, fuse, load, preprocessing
from backbones.fusing.int8_state import Precision

# What ``--calibration`` needs.
_WANTED = "give a folder of images like those that the model will see"
_INT8 = Kind((".safetensors",), rb".{8}\{.*\.weight_scale\"")
_BATCH = 16  # images to calibrate with at a time
_FORMATS = {"onnx": ONNX, "pt2": PT2, "safetensors": _INT8}

EXAMPLE = "van_b0 --checkpoint van_b0.pth --dynamic --out van.onnx"


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="name of the architecture")
    add("--out", type=nonempty_path, required=True, metavar="FILE", help="file to write")
    add("--format", choices=_FORMATS, help="default: by the suffix of --out")
    add("--checkpoint", **FILE, help="default: untrained")
    add("--pretrained", action="store_true", help="download the published weights")
    add("--dynamic", action="store_true", help="dynamic batch and image size")
    add_size_argument(parser, "size to trace at (default: the model's)")
    add("--batch", type=whole(1), default=1, metavar="N", help="batch size if not dynamic (1)")
    add("--fused", action="store_true", help="fold norms and branches first")
    add("--int8", action="store_true", help="quantise: ONNX (QDQ), or safetensors for this library")
    add("--calibration", type=nonempty_path, metavar="FOLDER", help="folder of images for --int8")
    text = "how many of them (64)"
    add("--calibration-images", type=whole(1), default=64, metavar="N", help=text)
    text = "safetensors: maximum relative error of the output; sensitive layers are not quantised"
    add("--max-drop", type=real(0, above=True), metavar="X", help=text)
    add_overwrite(parser)


@exit_on_signals()
def run(options: Namespace) -> int:
    """Run ``export``; 0 if the file is written and right."""
    suffix = options.out.suffix.lower().removeprefix(".")
    format = options.format or (suffix if suffix in _FORMATS else "onnx")
    ours = format == "safetensors"
    if options.int8 and format == "pt2":
        raise CommandError("--int8 requires ONNX or safetensors; omit --format pt2")
    if ours and not options.int8:
        raise CommandError("safetensors are only for --int8; other checkpoints need no export")
    others = {"dynamic": options.dynamic, "batch": options.batch != 1, "fused": options.fused}
    if ours and any(others.values()):
        given = ", ".join(f"--{name}" for name, is_given in others.items() if is_given)
        raise CommandError(
            f"safetensors hold a fused model for any batch and image size; omit {given}"
        )
    if options.max_drop is not None and not ours:
        raise CommandError("--max-drop needs safetensors: use --out FILE.safetensors --int8")
    if options.int8 and options.calibration is None and not ours:
        raise CommandError(f"--int8 needs --calibration FOLDER; {_WANTED}")
    if options.calibration is not None and not options.int8:
        raise CommandError("--calibration requires --int8; add it, or omit --calibration")
    require_writable(
        {"--out": (options.out, _FORMATS[format])},
        [options.checkpoint, options.calibration],
        options.overwrite,
        streams=False,
    )
    if any("\ud800" <= character <= "\udfff" for character in os.path.realpath(options.out)):
        raise CommandError(
            f"--out {options.out} is not UTF-8, which the libraries that write it require"
        )
    if format == "onnx":
        graphs.require_onnx()
    loaded = load(options.model, options.checkpoint, options.pretrained)
    if options.fused and not isinstance(loaded.model, StagedBackbone):
        raise CommandError(f"--fused needs a model of this library, not {loaded.name}")
    if getattr(loaded.model, "precision", None) is not None:
        raise CommandError(f"{options.checkpoint} has int8 weights, which cannot be exported")
    if options.fused:
        loaded.model.fuse(channels_last=False)  # only fold; the other runtime has its own kernels
    size = two_sides(options.size, loaded.model)
    shape = (options.batch, channels_of(loaded.model), *size)
    shapes = graphs.check_shapes(shape, options.dynamic)
    try:
        require_size(loaded.model, *(shape[2:] for shape in shapes))
    except ValueError as error:
        raise CommandError(f"{loaded.name}: {error}; omit --dynamic") from error
    images = None
    if options.calibration is not None:
        images = calibration_images(loaded, options.calibration, options.calibration_images, size)
    if options.checkpoint is None and not options.pretrained:
        sys.stderr.write(
            f"note: without --checkpoint or --pretrained, {loaded.name} is exported untrained\n"
        )
    if ours:
        export_int8(loaded, options.out, size, images, options.max_drop)
    else:
        export(loaded, options.out, format, shapes, images)
    return 0


def export(
    loaded: Loaded,
    path: Path,
    format: str,
    shapes: Sequence[tuple[int, ...]],
    images: Sequence[Tensor] | None = None,
) -> None:
    """Write ``path`` as "onnx" or "pt2" if its outputs equal the model's, and print a report.

    Args:
        shapes: to compare at; the file is for any batch and size if there are several.
        images: (1, C, H, W) each, for int8 calibration; None for no int8.
    """
    model, name, shape, dynamic = loaded.model, loaded.name, shapes[0], len(shapes) > 1
    try:
        with replacing_together(path) as scratch:
            run = _write(loaded, scratch, format, shape, dynamic)
            worst = 0.0
            for found in graphs.check(model, run, shapes):
                line = f"  {_sizes(found.shape):<16} error {found.error:.1e}"
                if found.allowed > graphs.TOLERANCE:
                    line += "; these weights amplify rounding errors, up to "
                    line += f"{found.allowed:.1e} is expected"
                _say(line)
                if found.error > found.allowed:
                    raise CommandError(
                        f"the file differs from the model by {found.error:.1e} of the maximum "
                        f"output (allowed: {found.allowed:.0e}); it was not written"
                    )
                worst = max(worst, found.error)
            if images is not None:
                _quantize(model, scratch, shapes, images)
            total = sum(part.stat().st_size for part in scratch.parent.iterdir())
    except CommandError as error:
        raise CommandError(f"{name}: {error}") from error
    where = "any batch and size" if dynamic else f"images {_sizes(shape)}"
    accuracy = f"max error {worst:.1e}"
    if images is not None:
        name, accuracy = f"{name} in int8", f"{accuracy} before quantisation"
    _say(f"{path}: {name} for {where}, {total / 1e6:.1f} MB, {accuracy}")


def _write(
    loaded: Loaded, path: Path, format: str, shape: tuple[int, ...], dynamic: bool
) -> graphs.Run:
    """Trace the model and write the file; returns a function that runs it."""
    model, name = loaded.model, loaded.name
    _say(f"{name}: tracing at {_sizes(shape)}")
    program = graphs.trace(model, shape, dynamic)
    if format == "pt2":
        graphs.save_program(program, path)
        return graphs.program_runner(path)
    _say(f"{name}: writing ONNX")
    config = json.dumps(preprocessing(loaded), default=list)
    facts = {**_metadata_of(loaded), "torch": torch.__version__, "preprocessing": config}
    graphs.save_onnx(program, path, facts)
    _say(f"{name}: comparing with the model")
    return graphs.onnx_runner(path)


def _quantize(
    model: Any, path: Path, shapes: Sequence[tuple[int, ...]], images: Sequence[Tensor]
) -> None:
    """Quantise the file and compare it with the model, on the images and at each size."""
    _say("quantising")
    expensive = ["Conv", "MatMul", "Gemm"]
    constant = {"MatMulConstBOnly": True}
    quantize(path, images, op_types_to_quantize=expensive, extra_options=constant)
    runner = graphs.onnx_runner(path)
    _say(f"  {agreement(model, runner, images)[0]}")
    for number, shape in enumerate(shapes[1:], start=1):
        _, decibels = agreement(model, runner, [graphs.noise(shape, number)])
        _say(f"  {_sizes(shape):<16} int8, noise: {decibels:.1f} dB")


def _sizes(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# -- int8 ------------------------------------------------------------------------------------------


def calibration_images(
    loaded: Loaded, folder: Path, count: int, size: tuple[int, int]
) -> list[Tensor]:
    """``count`` images (1, C, H, W), preprocessed.

    They are sampled evenly from the folder; unreadable ones are skipped.
    """
    config = {**preprocessing(loaded), "input_size": (channels_of(loaded.model), *size)}
    resize = Resizing(config)
    try:
        paths, _ = find_images([folder])
    except (CommandError, OSError) as error:
        raise CommandError(f"--calibration: {error}; {_WANTED}") from error
    images: list[Tensor] = []
    for path in paths[:: max(1, len(paths) // count)][:count]:
        pixels, _ = resize.read(path)
        if pixels is not None:
            images.append(resize.normalise(pixels[None]))
    if not images:
        raise CommandError(f"--calibration: no readable images in {folder}; {_WANTED}")
    return images


def quantize(path: Path, images: Sequence[Tensor], **options: Any) -> None:
    """Quantise an ONNX file in place, by onnxruntime's static quantisation with ``options``.

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
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                **options,
            )
    except Exception as error:  # onnxruntime's have no public base
        raise CommandError(f"cannot be quantised: {first_line(error)}") from error
    finally:
        tempfile.tempdir = folder
        prepared.unlink(missing_ok=True)
    os.replace(quantized, path)


def _metadata_of(loaded: Loaded) -> dict[str, str]:
    """What a file says of its model: its name and, if known, those of its classes."""
    classes = {"classes": json.dumps(loaded.classes)} if loaded.classes else {}
    return {"model": loaded.name, **classes}


def agreement(model: nn.Module, run: graphs.Run, images: Sequence[Tensor]) -> tuple[str, float]:
    """How the outputs of ``run`` in int8 agree with the model's: in words, and the noise in dB."""
    same, signal, noise = 0, 0.0, 0.0
    classifies = True
    for image in images:
        expected, got = graphs.outputs(model, run, image)
        if not got.isfinite().all():
            raise CommandError(f"at {tuple(image.shape)} the int8 file's output is not finite")
        signal += expected.square().sum().item()
        noise += (expected - got).square().sum().item()
        classifies = expected.ndim == 2 and expected.shape[1] > 1
        if classifies:
            same += int(expected.argmax(1).eq(got.argmax(1)).sum())
    decibels = 10 * math.log10(signal / noise) if noise else math.inf
    text = f"signal to noise {decibels:.1f} dB"
    if not classifies:
        return f"int8 vs. float: {text}", decibels
    share = f"{100 * same / len(images):.1f} % of {len(images)} predictions"
    return f"int8 agrees with float in {share}, {text}", decibels


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
    probe = graphs.noise((1, channels_of(exact), *size), 0)
    with replacing_together(path) as scratch:
        facts = _metadata_of(loaded)
        if loaded.recipe is not None:
            facts["recipe"] = dump(loaded.recipe)
        save_weights(scratch, model.int8_state_dict(), facts)
        again = copy.deepcopy(exact)
        try:
            backbones.load_checkpoint(again, scratch)
        except backbones.CheckpointError as error:
            problem = str(error).replace(str(scratch), str(path))
            raise CommandError(f"{loaded.name}: {problem}; it was not written") from error
        wrong = graphs.difference(_forward(again, probe), _forward(model, probe))
        if wrong > graphs.TOLERANCE:
            raise CommandError(
                f"{loaded.name}: the file differs from the model by {wrong:.1e} of the maximum "
                "output; it was not written"
            )
    _say(f"  {precision.summary()}")
    if images is not None:
        _say(f"  {agreement(exact, lambda image: _forward(model, image), images)[0]}")
    megabytes = path.stat().st_size / 1e6
    _say(f"{path}: {loaded.name} in int8 for any batch and size, {megabytes:.1f} MB")


@torch.inference_mode()
def _forward(model: Any, image: Tensor) -> Tensor:
    out: Tensor = model(image.to(next(model.parameters()).dtype))
    return out.float()
