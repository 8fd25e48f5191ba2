"""``vision-backbones upscale``: files, folders and globs of pictures, into a folder."""

from __future__ import annotations

import argparse
import glob
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from backbones.common.arguments import nonempty_path, whole
from backbones.common.errors import DataError, MendableError, memory_shortage
from backbones.common.images import has_image_ending
from backbones.common.messages import one_line, shown
from backbones.common.outputs import Kind, add_overwrite, require_folder, require_writable
from backbones.common.progress import Progress, duration
from backbones.restoration.panels import Panel, draw_panels, most_detailed_window
from backbones.restoration.pictures import (
    SUFFIXES,
    Picture,
    read_picture,
    read_size,
    to_tensor,
    write_picture,
)
from backbones.restoration.resize import resize_bicubic
from backbones.restoration.restorer import add_model_arguments, restorer_of
from backbones.restoration.upscale import Upscaler

EXAMPLE = "photos/ --model hat_x4 --checkpoint HAT_SRx4.pth --out enlarged"


_PICTURE = Kind(SUFFIXES, rb"\x89PNG|\xff\xd8\xff|RIFF.{4}WEBP|II\*\0|MM\0\*|BM")


Job = tuple[Path, Path]  # the picture to read and the file to write


def plan_jobs(
    inputs: Iterable[str | Path],
    out: Path,
    suffix: str,
    format: str | None = None,
    compare: bool = False,
    read: Iterable[Path | None] = (),
    overwrite: bool = False,
) -> list[Job]:
    """The pictures to read with the files to write.

    Args:
        inputs: files, folders (recursively, with the same structure in ``out``) and globs. Files
            in ``out`` are never used as a folder's inputs.
        format: suffix of all results, such as ``png``; None for the picture's own, or PNG if that
            can't be written.
        read: other files that must not be replaced.
    """
    if any(character in suffix for character in (os.sep, os.altsep, "\0") if character):
        raise DataError(f"--suffix must be part of a file's name, not {shown(suffix)}")
    require_folder("--out", out)
    found: dict[Path, Path] = {}  # picture → place below out
    for item in map(str, inputs):
        path = Path(item)
        if path.is_dir():
            named = (p for p in path.rglob("*") if has_image_ending(p))
            # Include named pipes and broken links; reading them reports the problem.
            real = os.path.realpath(out)
            outside = (p for p in named if not Path(os.path.realpath(p)).is_relative_to(real))
            pictures = sorted(p for p in outside if not p.is_dir())
        elif os.path.lexists(path) or not glob.has_magic(item):
            pictures = [path]
        else:
            matches = map(Path, sorted(glob.glob(item, recursive=True)))
            pictures = [match for match in matches if not match.is_dir()]
        if not pictures:
            raise DataError(f"no images in {path}" if path.is_dir() else f"nothing matches {item}")
        for picture in pictures:
            place = picture.relative_to(path) if path.is_dir() else Path(picture.name)
            found.setdefault(picture, place)
    jobs: list[Job] = []
    taken: dict[Path, Path] = {}
    outputs: dict[str, tuple[Path, Kind]] = {}
    for source, place in found.items():
        ending = f".{format}" if format else place.suffix
        if ending.lower() not in SUFFIXES:
            ending = ".png"
        target = out / place.with_name(f"{place.stem}{suffix}{ending}")
        for file in (target, _comparison(target)) if compare else (target,):
            if file in taken:
                raise DataError(
                    f"{taken[file]} and {source} would both become {file}: upscale them "
                    "separately, with different --out"
                )
            taken[file] = source
            outputs[f"{source} as"] = file, _PICTURE
        jobs.append((source, target))
    require_writable(outputs, [*found, *read], overwrite, makes_folders=True)
    return jobs


def upscale_files(
    upscaler: Upscaler, jobs: Sequence[Job], options: argparse.Namespace, progress: Progress
) -> Counter[str]:
    """Restore pictures one after the other, continuing after errors (unreadable, unwritable, or too
    large for memory); returns the number of those "written", "failed" and "skipped".
    """
    counts: Counter[str] = Counter()

    def fail(path: Path, error: Exception) -> None:
        why = str(error) if str(path) in str(error) else f"{path}: {error}"
        counts["failed"] += 1
        sys.stderr.write(f"error: {one_line(why)}\n")

    planned: list[tuple[Job, int]] = []
    for source, target in jobs:
        if options.skip_existing and target.exists():
            counts["skipped"] += 1
            continue
        try:
            planned.append(((source, target), upscaler.tiles(*read_size(source))))
        except DataError as error:
            fail(source, error)
    progress.begin("tiles", sum(tiles for _, tiles in planned))
    for number, ((source, target), tiles) in enumerate(planned, start=1):
        until, at = progress.done + tiles, f"{source.name} ({number}/{len(planned)})"

        def tick(at: str = at) -> None:
            progress.step(f"{at}  {duration(progress.seconds_left())} left")

        try:
            before = read_picture(source)
            after: Picture = upscaler(before, tick)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_picture(target, after, options.quality)
            if options.compare:
                _draw(_comparison(target), source.name, before, after)
        except (MendableError, OSError, MemoryError, RuntimeError) as error:
            shortage = memory_shortage(error)
            if shortage is None and not isinstance(error, (MendableError, OSError)):
                raise
            progress.done = until
            fail(source, MemoryError(shortage) if shortage else error)
            continue
        counts["written"] += 1
        sizes = (f"{p.pixels.shape[1]}×{p.pixels.shape[0]}" for p in (before, after))
        note = f" ({before.note})" if before.note else ""
        progress.say(f"{one_line(str(target))}  {' → '.join(sizes)}{note}")
    progress.end()
    return counts


def _comparison(target: Path) -> Path:
    """The name of a comparison, ``NAME_compare.png``, or ``NAME_jpg_compare.png`` and so on."""
    kind = "" if target.suffix == ".png" else f"_{target.suffix[1:]}"
    return target.with_name(f"{target.stem}{kind}_compare.png")


def _draw(path: Path, title: str, before: Picture, after: Picture) -> None:
    result, source = (to_tensor(picture.pixels, 3) for picture in (after, before))
    step = result.shape[1] // source.shape[1]
    name = "before" if step == 1 else "before (bicubic)"
    panels = [Panel(name, resize_bicubic(source, step)), Panel("after", result)]
    draw_panels(path, panels, most_detailed_window(result, 480, step), title)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("inputs", nargs="+", type=nonempty_path, metavar="IN", help="image, folder or glob")
    add_model_arguments(parser)
    add("--out", required=True, type=nonempty_path, metavar="DIR", help="folder for the results")
    add("--tile", type=_tile, default="auto", help="side in pixels, auto, or none (default: auto)")
    add("--overlap", type=int, default=32, help="margin around tiles in pixels (default: 32)")
    add("--compare", action="store_true", help="also write a comparison image")
    add("--suffix", help="suffix of the results' names (default: _x4, …)")
    endings = [s[1:] for s in SUFFIXES]
    add("--format", choices=endings, help="format of the results (default: the input's)")
    add("--quality", type=whole(1, 100), default=95, help="quality of JPEG and WebP (default: 95)")
    add("--skip-existing", action="store_true", help="skip images whose result exists")
    add_overwrite(parser)


def run(options: argparse.Namespace) -> int:
    """Run ``upscale``; returns 0, or 1 if a picture failed."""
    model, memory = restorer_of(options)
    usual = "_restored" if model.upscale == 1 else f"_x{model.upscale}"
    jobs = plan_jobs(
        options.inputs,
        options.out,
        usual if options.suffix is None else options.suffix,
        options.format,
        options.compare,
        [options.checkpoint],
        options.overwrite,
    )
    progress = Progress()
    begun = time.monotonic()
    try:
        given = {name: getattr(options, name) for name in ("tile", "overlap", "tta", "amp")}
        upscaler = Upscaler(model, **given, max_memory=memory)
        counts = upscale_files(upscaler, jobs, options, progress)
    except ValueError as error:
        raise DataError(str(error)) from error
    finally:
        progress.end()
    parts = [f"{counts['written']} of {len(jobs)} images in {options.out}"]
    if counts["skipped"]:
        parts.append(f"{counts['skipped']} already existed")
    if counts["failed"]:
        parts.append(f"{counts['failed']} failed")
    progress.say(f"{', '.join(parts)}, {duration(time.monotonic() - begun)}")
    return 1 if counts["failed"] else 0


def _tile(text: str) -> int | str | None:
    """A type for ``--tile``."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(
            f"must be a number of pixels, auto or none, not {shown(text)}"
        )
    return int(text)
