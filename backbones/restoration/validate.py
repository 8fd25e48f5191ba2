"""``sr.py validate``: PSNR and SSIM over the folders of Set5, Set14, BSD100, Urban100, Manga109."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from backbones.common.arguments import FILE, nonempty_path
from backbones.common.console import Parser, guard
from backbones.common.errors import DataError
from backbones.common.files import write_text_atomically
from backbones.common.images import has_image_ending
from backbones.common.outputs import add_overwrite, csv_of, csv_of_rows, require_writable
from backbones.common.progress import Progress
from backbones.restoration.data import load_truth
from backbones.restoration.metrics import quality
from backbones.restoration.pictures import Picture, PictureError, read_picture, to_pixels, to_tensor
from backbones.restoration.resize import resize_bicubic
from backbones.restoration.restorer import add_model_arguments, restorer_of
from backbones.restoration.upscale import Upscaler

EXAMPLE = "Set5 Urban100 --model hat_x4 --checkpoint HAT_SRx4.pth --csv scores.csv"
_TRUTHS = ("HR", "GT", "GTmod12", "GTmod{}", "original", "image_SRF_{}")
_INPUTS = ("LR", "LR/X{}", "LRbicx{}", "LR_bicubic/X{}", "X{}", "image_SRF_{}")


Row = dict[str, Any]  # of the CSV file
_FIGURES = ("psnr_y", "ssim_y", "bicubic_psnr_y", "bicubic_ssim_y")
_COLUMNS = ("dataset", "picture", "height", "width", *_FIGURES)


def find_pairs(folder: Path, scale: int) -> list[tuple[Path, Path | None]]:
    """The ground-truth pictures of a folder, with their low-resolution ones if present.

    Ground truth is in ``HR``, ``GT``, ``GTmod12``, ``GTmod4``, ``original`` or ``image_SRF_4`` (for
    scale 4), or in the folder itself; low-resolution pictures are in ``LR``, ``LR/X4``,
    ``LRbicx4``, ``LR_bicubic/X4``, ``X4`` or ``image_SRF_4``. They are matched by name, ignoring
    ``x4``, ``_SRF_4``, ``_HR`` and ``_LR`` at the end.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    places = (folder / name.format(scale) for name in _TRUTHS)
    root = next((p for p in places if p.is_dir()), folder)
    truths = [p for p in _pictures(root) if not _is_reduced(p)]
    if not truths:
        raise DataError(f"no image in {root}")
    inputs: dict[str, Path] = {}
    for place in (folder / name.format(scale) for name in _INPUTS):
        found = _pictures(place) if place.is_dir() and not inputs else []
        inputs |= {_key(p): p for p in found if place != root or _is_reduced(p)}
    if not inputs:
        return [(truth, None) for truth in truths]
    missing = [t.name for t in truths if _key(t) not in inputs]
    if missing:
        raise DataError(f"{folder}: no low-resolution image for {', '.join(missing[:5])}")
    return [(truth, inputs[_key(truth)]) for truth in truths]


def validate(
    upscaler: Upscaler, folder: Path, on_picture: Callable[[str], object] | None = None
) -> list[Row]:
    """Score the model on a folder, excluding a border of ``scale`` pixels.

    Missing low-resolution pictures are made bicubically from the ground truth, as in the papers
    (see :mod:`backbones.restoration.resize`), and rounded to 8 bits.
    """
    scale, rows = upscaler.scale, list[Row]()
    for truth_path, input_path in find_pairs(folder, scale):
        truth = load_truth(truth_path, 3, scale)
        height, width = truth.shape[1:]
        if input_path is None:
            small = Picture(to_pixels(resize_bicubic(truth, 1 / scale)))
        else:
            small = read_picture(input_path)
            if small.is_grey:
                small = Picture(small.pixels.repeat(3, axis=2))
            if tuple(n * scale for n in small.pixels.shape[:2]) != (height, width):
                raise PictureError(
                    f"{input_path} of {small.pixels.shape[1]}×{small.pixels.shape[0]} is not "
                    f"{scale} times smaller than {truth_path} of {width}×{height}"
                )
        ours = to_tensor(upscaler(small).pixels, 3)
        bicubic = resize_bicubic(to_tensor(small.pixels, 3), scale)
        place = (folder.name, truth_path.name, height, width)
        figures = (quality(ours, truth, scale), quality(bicubic, truth, scale))
        values = (value for one in figures for value in one.values())
        rows.append(dict(zip(_COLUMNS, (*place, *values), strict=True)))
        if on_picture is not None:
            on_picture(truth_path.name)
    return rows


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if has_image_ending(p))


def _is_reduced(path: Path) -> bool:
    return path.stem.upper().endswith("_LR")


def _key(path: Path) -> str:
    return re.sub(r"(_SRF_\d|_HR|_LR|_?x\d)+$", "", path.stem, flags=re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add, text = parser.add_argument, "folders, one per data set"
    add("folders", nargs="+", type=nonempty_path, metavar="FOLDER", help=text)
    add_model_arguments(parser)
    add("--csv", **FILE, help="a row for each image")
    add_overwrite(parser)


def run(options: argparse.Namespace) -> int:
    """Run ``sr.py validate`` and print a line for each data set; returns 0."""
    require_writable(
        {"--csv": (options.csv, csv_of(*_COLUMNS))},
        [options.checkpoint, *options.folders],
        options.overwrite,
    )
    model, memory = restorer_of(options)
    if model.upscale == 1:
        raise DataError("this validates super-resolution; the model's upscale is 1")
    upscaler = Upscaler(model, tta=options.tta, amp=options.amp, max_memory=memory)
    pairs = {folder: find_pairs(folder, upscaler.scale) for folder in options.folders}
    progress = Progress()
    rows: list[Row] = []
    for folder in options.folders:
        progress.begin(folder.name, len(pairs[folder]))
        of_folder = validate(upscaler, folder, progress.step)
        mean = {key: sum(row[key] for row in of_folder) / len(of_folder) for key in _FIGURES}
        unsized = {"dataset": folder.name, "picture": "mean", "height": 0, "width": 0}
        rows += [*of_folder, {**unsized, **mean}]
        progress.end()
        progress.say(
            f"{folder.name:<12} {len(of_folder):4} images  PSNR-Y {mean['psnr_y']:6.2f} dB  "
            f"SSIM-Y {mean['ssim_y']:.4f}  (bicubic {mean['bicubic_psnr_y']:6.2f}  "
            f"{mean['bicubic_ssim_y']:.4f})"
        )
    if options.csv is not None:
        text = [{k: f"{v:.4f}" if k in _FIGURES else v for k, v in row.items()} for row in rows]
        write_text_atomically(options.csv, csv_of_rows(text))
    return 0


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Run from a command line; returns 0, or 2 if it could not be done."""
    parser = Parser(description=description)
    add_arguments(parser)
    return guard(lambda: run(parser.parse_args(argv)))
