"""Output of commands: the text of CSV and JSON files, and the rule for overwriting."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from argparse import ArgumentParser
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbones.common.errors import CommandError
from backbones.common.files import write_text_atomically
from backbones.common.images import has_image_ending

# The version of the JSON that commands write.
FORMAT = 1


@dataclass(frozen=True)
class Kind:
    """A kind of output file."""

    endings: tuple[str, ...]  # of its names, in lower case; the first is the usual one
    begins: bytes  # a regular expression for how an earlier file of this kind begins


def csv_of(*columns: str) -> Kind:
    """CSV whose first columns have these names."""
    return Kind((".csv",), re.escape(",".join(columns).encode()))


def json_of(key: str) -> Kind:
    """JSON of :func:`json_text` whose first key is ``key``."""
    return Kind((".json",), rb'\{\s*"format": \d+,\s*"%b":' % re.escape(key.encode()))


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Text of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def csv_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Text of CSV with a column for each key; rows need not have all."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text(columns, ([row.get(key, "") for key in columns] for row in rows))


def json_text(content: Mapping[str, Any]) -> str:
    """Text of a JSON object, with the version of its format in front."""
    content = {"format": FORMAT, **content}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_if_asked(path: Path | None, text: str) -> None:
    """Write a file, if an option names one."""
    if path is not None:
        write_text_atomically(path, text)


FIGURE = Kind((".png",), rb"\x89PNG\r\n\x1a\n.{0,400}Software\x00Matplotlib")
HTML = Kind((".html", ".htm"), rb"<!doctype html>.{0,400}default-src 'none'; img-src data:")
ONNX = Kind((".onnx",), rb"\x08[\x03-\x1f]")  # the version of the format, always the first field
PT2 = Kind((".pt2",), rb"PK\x03\x04")
REPORT = Kind((".json",), rb'\{\s*("format": \d+,\s*)?"machine":')  # the first had no format

# Of an existing file; the header of a safetensors file precedes its numbers.
_READ = 1 << 20


def add_overwrite(parser: ArgumentParser) -> None:
    """``--overwrite``, the argument of :func:`require_writable`."""
    parser.add_argument(
        "--overwrite", action="store_true", help="also replace existing files of other kinds"
    )


def require_writable(
    outputs: Mapping[str, tuple[Path | None, Kind]],
    inputs: Iterable[str | Path | None] = (),
    overwrite: bool | None = None,
    makes_folders: bool = False,
    streams: bool = True,
) -> None:
    """Check output files before any work is done. Links are resolved.

    An output is not an input, has an ending of its kind, and replaces no existing file of another
    kind unless ``overwrite``, which is None if the command has no such option.

    Args:
        outputs: files and their kinds by option; None for options that are not given.
        inputs: files that are read, and folders whose images are.
        makes_folders: whether missing folders will be created.
        streams: whether devices and pipes may be outputs.
    """
    given = {option: (file, kind) for option, (file, kind) in outputs.items() if file is not None}
    options: dict[str, str] = {}
    for option, (file, _) in given.items():
        other = options.setdefault(os.path.realpath(file), option)
        if other != option:
            raise CommandError(f"{other} and {option} are both {file}: name two files")
    if (found := overwritten([file for file, _ in given.values()], inputs)) is not None:
        file, read = found
        option = options[os.path.realpath(file)]
        raise CommandError(f"{option} {file} would overwrite {read}, an input")
    for option, (file, kind) in given.items():
        _require_kind(option, file, kind, overwrite, makes_folders, streams)


def overwritten(
    outputs: Collection[Path], inputs: Iterable[str | Path | None]
) -> tuple[Path, str | Path] | None:
    """The first output that is an input of :func:`require_writable`, with that input; or None."""
    there = {key: file for file in outputs if (key := _key(file)) is not None}
    if not there:
        return None  # new files overwrite nothing
    images = [file for file in there.values() if has_image_ending(os.path.realpath(file))]
    for read in inputs:
        if read is None or (key := _key(read)) is None:
            continue
        if key in there:
            return there[key], read
        if images and os.path.isdir(read):
            folder = os.path.realpath(read)
            for file in images:
                if Path(os.path.realpath(file)).is_relative_to(folder):
                    return file, f"an image in {read}"
    return None


def _key(file: str | Path) -> tuple[int, int] | None:
    """The identity of an existing file, as in ``os.path.samefile``."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return None if stat.S_ISCHR(found.st_mode) else (found.st_dev, found.st_ino)


def _require_kind(
    option: str, file: Path, kind: Kind, overwrite: bool | None, makes_folders: bool, streams: bool
) -> None:
    real = Path(os.path.realpath(file))
    place = (real if file.is_symlink() else file).parent
    if real.is_dir():
        raise CommandError(f"{option} {file} is a folder: name a file in it")
    if file.exists() and not file.is_file():
        if streams:
            return
        raise CommandError(f"{option} {file} is not a regular file and can't be replaced")
    if real.suffix.lower() not in kind.endings:
        linked = f", and {real}, to which it is a link, does not" if file.is_symlink() else ""
        raise CommandError(f"{option} {file} must end in {' or '.join(kind.endings)}{linked}")
    if not makes_folders and not real.parent.is_dir():
        raise CommandError(f"cannot write {file.name}: there is no folder {place}")
    require_folder(option, place)
    if not overwrite and not _is_earlier(real, kind):
        hint = "" if overwrite is None else ", or replace it with --overwrite"
        raise CommandError(
            f"{option} {file} exists and is not an earlier result: choose another name{hint}"
        )


def _is_earlier(file: Path, kind: Kind) -> bool:
    """Whether ``file`` is of a kind, empty or missing."""
    if not file.exists():
        return True
    try:
        with open(file, "rb") as there:
            head = there.read(_READ)
    except OSError:
        return False
    return not head or re.match(kind.begins, head, re.DOTALL) is not None


def require_folder(option: str, folder: Path) -> None:
    """Check that a folder is writable or can be created."""
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p) or p == p.parent)
    if not there.is_dir():
        raise CommandError(f"{option}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(f"{option}: the folder {there} cannot be written to")
