"""Measure the accuracy of models fused in 8 bits: all families on digits, HAT on photographs.

    python tools/int8_accuracy.py --checkpoints runs/digits            # the runs in this folder
    python tools/int8_accuracy.py --checkpoints runs/digits --train    # train missing ones first
    python tools/int8_accuracy.py --checkpoints runs/digits --models van_b0 shvit_s1 --resume

A run in ``--checkpoints`` is ``FOLDER/MODEL``, as ``train_cls.py --config
configs/cls/bench_digits.yaml --model MODEL --output FOLDER --name MODEL`` writes it. Each model is
compared with itself in float32 before ``fuse()``: fused in float32 and bfloat16, and in int8 with a
range for each row of inputs (dynamic) and with ranges from 64 training images (calibrated). Results
go to ``--output`` after each model; ``tools/performance_page.py`` writes the page.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import load_report, machine, replace_results
from torch import Tensor, nn
from trained_runs import CLASSIFIERS, RESTORER, Digits, Pictures, digits_run, pictures_run, train

import backbones
from backbones.common.arguments import nonempty_path
from backbones.common.console import Parser, guard
from backbones.common.errors import CREATION_ERRORS, CommandError
from backbones.common.errors import MendableError as TrainingError
from backbones.common.outputs import REPORT, require_writable
from backbones.core.messages import first_line
from backbones.restoration.metrics import quality
from ops.cpu.instruction_sets import instruction_set

__all__ = ["FORMS", "compare", "here", "main", "of_digits", "of_pictures", "predict"]

logger = logging.getLogger("int8_accuracy")

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "performance" / "int8_accuracy.json"
_BATCH = 71  # a fifth of the validation images

Fuse = Callable[[nn.Module, Sequence[Tensor]], nn.Module]
FORMS: dict[str, Fuse] = {
    "fused": lambda model, _: backbones.fuse(model),
    "bfloat16": lambda model, _: backbones.fuse(model, dtype=torch.bfloat16),
    "int8": lambda model, _: backbones.fuse(model, dtype=torch.int8),
    "int8_calibrated": lambda model, images: backbones.fuse(
        model, dtype=torch.int8, calibrate=images
    ),
}
"""By label: how a copy of the model is fused, given batches of calibration images."""


def here() -> dict[str, Any]:
    """The machine, with the instruction set of our kernels."""
    return {**machine(torch.device("cpu")), "instruction_set": instruction_set()}


@torch.inference_mode()
def predict(run: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    """The outputs for all images in float32, ``batch`` at a time; the last is filled up."""
    outputs = []
    for part in images.split(batch):
        filled = torch.cat((part, part[:1].expand(batch - len(part), *part.shape[1:])))
        outputs.append(run(filled)[: len(part)].float())
    return torch.cat(outputs)


def compare(outputs: Tensor, exact: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and agreement of predictions with those of ``exact`` in %, and the relative error.

    Args:
        outputs, exact: (N, classes).
        labels: (N,).
    """
    predicted = outputs.argmax(1)
    error = (outputs.double() - exact.double()).norm() / exact.double().norm()
    return {
        "top1": 100 * (predicted == labels).double().mean().item(),
        "agreement": 100 * (predicted == exact.argmax(1)).double().mean().item(),
        "error": error.item(),
    }


def of_digits(run: Digits) -> dict[str, Any]:
    """The figures of a classifier, in each of :data:`FORMS`."""
    exact = predict(run.model, run.images, _BATCH)
    found = {"float32": compare(exact, exact, run.labels)}

    def measure(model: nn.Module) -> dict[str, float]:
        return compare(predict(_in_dtype(model), run.images, _BATCH), exact, run.labels)

    forms, layers = _measure_forms(run.model, run.calibration.split(32), measure)
    counts = {"images": len(run.labels), "calibration_images": len(run.calibration)}
    return {"kind": "digits", **counts, **layers, "forms": found | forms}


def of_pictures(run: Pictures) -> dict[str, Any]:
    """The figures of a restorer, in each of :data:`FORMS`: mean PSNR of luma in dB."""

    def measure(model: nn.Module) -> dict[str, float]:
        restore = _in_dtype(model)
        scale = int(run.model.upscale)  # type: ignore[arg-type]
        with torch.inference_mode():
            scores = [
                quality(restore(degraded.unsqueeze(0))[0].float(), truth, scale)
                for degraded, truth in run.pairs
            ]
        return {"psnr": math.fsum(score["psnr_y"] for score in scores) / len(scores)}

    forms, layers = _measure_forms(run.model, run.calibration, measure)
    counts = {"images": len(run.pairs), "calibration_images": len(run.calibration)}
    forms = {"float32": measure(run.model), **forms}
    return {"kind": "pictures", **counts, **layers, "forms": forms}


def _measure_forms(
    plain: nn.Module,
    calibration: Sequence[Tensor],
    measure: Callable[[nn.Module], dict[str, float]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures or the error of each form, and how many layers are in 8 bits."""
    forms: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    for label, fuse in FORMS.items():
        try:
            model: Any = fuse(copy.deepcopy(plain), calibration)
            forms[label] = measure(model)
        except CREATION_ERRORS as error:
            forms[label] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
            continue
        if model.precision is not None:
            layers = {"layers": len(model.precision.layers), **layers}
            forms[label]["quantized"] = len(model.precision.quantized)
            if model.precision.reason:
                forms[label]["reason"] = model.precision.reason
    return forms, layers


def _in_dtype(model: nn.Module) -> Callable[[Tensor], Tensor]:
    dtype = next(model.parameters()).dtype
    return lambda images: model(images.to(dtype))


def measure_model(name: str, folder: Path) -> dict[str, Any]:
    """The row of a model, from its run in ``folder``."""
    families = {m: f for f in backbones.list_families() for m in backbones.list_models(family=f)}
    of = (
        of_pictures(pictures_run(folder))
        if name == RESTORER
        else of_digits(digits_run(folder, name))
    )
    return {"model": name, "family": families[name], **of}


def describe(row: dict[str, Any]) -> str:
    """A line for each form."""
    lines = [row["model"]]
    for label, figures in row["forms"].items():
        values = (
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()
        )
        lines.append(f"    {label:<16} {'  '.join(values)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=[*CLASSIFIERS, RESTORER], metavar="NAME", help="default: all"
    )
    parser.add_argument("--checkpoints", type=nonempty_path, required=True, metavar="FOLDER")
    parser.add_argument("--train", action="store_true", help="train models without a run first")
    parser.add_argument("--resume", action="store_true", help="skip models of the output")
    parser.add_argument("--output", type=nonempty_path, default=OUTPUT)
    args = parser.parse_args(arguments)
    unknown = set(args.models) - {RESTORER, *backbones.list_models()}
    if unknown:
        parser.error(f"unknown models {', '.join(sorted(unknown))}; see backbones.list_models()")
    require_writable({"--output": (args.output, REPORT)}, makes_folders=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    try:
        report = load_report(args.output, here())
    except ValueError as error:
        raise CommandError(str(error)) from error
    done = {row["model"] for row in report["results"]} if args.resume else set()
    missing = []
    for name in args.models:
        if name in done:
            continue
        if not (args.checkpoints / name / "best.safetensors").is_file():
            if not args.train:
                missing.append(name)
                continue
            train(name, args.checkpoints)
        try:
            row = measure_model(name, args.checkpoints)
        except TrainingError as error:
            raise CommandError(f"{args.checkpoints / name}: {error}") from error
        replace_results(args.output, report, [row], ("model",))
        logger.info("%s", describe(row))
    if missing:
        logger.info("no run of %s in %s: add --train", ", ".join(missing), args.checkpoints)


if __name__ == "__main__":
    sys.exit(guard(main))
