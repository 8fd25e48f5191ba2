"""``vision-backbones export``: write a model as an ONNX or torch.export file and check it.

The file is compared with the model, at three sizes if sizes are dynamic. A model in int8 can also
be written as safetensors, for the library itself (``quantizing.py``).
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.cli import graphs, quantizing
from backbones.cli.common import add_size_argument, two_sides
from backbones.common.arguments import nonempty_path, real, whole
from backbones.common.errors import CommandError
from backbones.common.files import replacing_together, require_disk_space
from backbones.common.memory import require_memory
from backbones.common.outputs import ONNX, PT2, add_overwrite, require_writable
from backbones.common.signals import exit_on_signals
from backbones.core.base import StagedBackbone
from backbones.core.inputs import channels_of, require_size
from backbones.core.loaded import Loaded, load, preprocessing

_FORMATS = {"onnx": ONNX, "pt2": PT2, "safetensors": quantizing.INT8}

EXAMPLE = "van_b0 --checkpoint van_b0.pth --dynamic --out van.onnx"


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="name of the architecture")
    add("--out", type=nonempty_path, required=True, metavar="FILE", help="file to write")
    add("--format", choices=_FORMATS, help="default: by the suffix of --out")
    add("--checkpoint", type=nonempty_path, metavar="FILE", help="default: untrained")
    add("--pretrained", action="store_true", help="download the published weights")
    add("--dynamic", action="store_true", help="dynamic batch and image size")
    add_size_argument(parser, "size to trace at (default: the model's)")
    text = "batch size if not dynamic (1)"
    add("--batch", type=whole(1), default=1, metavar="N", help=text)
    add("--fused", action="store_true", help="fold norms and branches first")
    text = "quantise: ONNX (QDQ), or safetensors for this library"
    add("--int8", action="store_true", help=text)
    add("--calibration", type=nonempty_path, metavar="FOLDER", help="folder of images for --int8")
    text = "how many of them (64)"
    add("--calibration-images", type=whole(1), default=64, metavar="N", help=text)
    text = "safetensors: maximum relative error of the output; sensitive layers are not quantised"
    add("--max-drop", type=real(0, above=True), metavar="X", help=text)
    add_overwrite(parser)


def run(options: Namespace) -> int:
    """Run ``export``; 0 if the file is written and right."""
    with exit_on_signals():
        return _run(options)


def _run(options: Namespace) -> int:
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
        raise CommandError(f"--int8 needs --calibration FOLDER; {quantizing.WANTED}")
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
    require_memory(loaded.model, shapes)
    weights = sum(t.nbytes for t in loaded.model.state_dict().values())
    require_disk_space(options.out.parent, weights)
    images = None
    if options.calibration is not None:
        images = quantizing.calibration_images(
            loaded, options.calibration, options.calibration_images, size
        )
    if options.checkpoint is None and not options.pretrained:
        sys.stderr.write(
            f"note: without --checkpoint or --pretrained, {loaded.name} is exported untrained\n"
        )
    if ours:
        quantizing.export_int8(loaded, options.out, size, images, options.max_drop)
    else:
        export(loaded, options.out, format, size, options.batch, options.dynamic, images)
    return 0


def export(
    loaded: Loaded,
    path: Path,
    format: str,
    size: tuple[int, int],
    batch: int = 1,
    dynamic: bool = False,
    images: Sequence[Tensor] | None = None,
) -> None:
    """Write ``path`` as "onnx" or "pt2" if its outputs equal the model's, and print a report.

    Args:
        images: (1, C, H, W) each, for int8 calibration; None for no int8.
    """
    model, name = loaded.model, loaded.name
    shape = (batch, channels_of(model), *size)
    shapes = graphs.check_shapes(shape, dynamic)
    try:
        with replacing_together(path) as scratch:
            run = _write(loaded, scratch, format, shape, dynamic)
            worst = 0.0
            for found in graphs.check(model, run, shapes):
                _say(f"  {_sizes(found.shape):<16} error {found.error:.1e}{_excuse(found)}")
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
    facts = {**quantizing.metadata_of(loaded), "torch": torch.__version__, "preprocessing": config}
    graphs.save_onnx(program, path, facts)
    _say(f"{name}: comparing with the model")
    return graphs.onnx_runner(path)


def _quantize(
    model: Any, path: Path, shapes: Sequence[tuple[int, ...]], images: Sequence[Tensor]
) -> None:
    """Quantise the file and compare it with the model, on the images and at each size."""
    _say("quantising")
    quantizing.quantize(path, images)
    runner = graphs.onnx_runner(path)
    agreement = quantizing.agreement(model, runner, images)
    _say(f"  {agreement.text(len(images))}")
    for number, shape in enumerate(shapes[1:], start=1):
        found = quantizing.agreement(model, runner, [graphs.noise(shape, number)])
        _say(f"  {_sizes(shape):<16} int8, noise: {found.decibels:.1f} dB")


def _excuse(found: graphs.Check) -> str:
    if found.allowed == graphs.TOLERANCE:
        return ""
    return f"; these weights amplify rounding errors, up to {found.allowed:.1e} is expected"


def _sizes(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
