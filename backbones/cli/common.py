"""Shared by the commands: sizes of images, names of classes, texts."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbones.common.arguments import whole
from backbones.common.errors import CommandError
from backbones.common.messages import one_line, shown
from backbones.core.inputs import require_size, size_of


def add_size_argument(parser: ArgumentParser, help: str) -> None:
    """``--size S`` or ``--size H W``; see :func:`two_sides`."""
    # JPEG stores sides in 16 bits.
    parser.add_argument("--size", type=whole(1, 65535), nargs="+", metavar="PX", help=help)


def two_sides(size: Sequence[int] | None, model: Any) -> tuple[int, int]:
    """Height and width: as given by the user, or else the model's default input size."""
    if size is None:
        return size_of(model)
    if len(size) > 2:
        raise CommandError(f"--size must be one side, or height and width, got {shown(list(size))}")
    sides = size[0], size[-1]
    try:
        require_size(model, sides)
    except ValueError as error:
        raise CommandError(f"--size {sides[0]} {sides[1]}: {error}") from error
    return sides


def read_labels(path: Path, count: int) -> list[str]:
    """Class names from a text file with one per line, or JSON (a list, or a dict by index)."""
    text = read_text(path, "--labels")
    if path.suffix == ".json":
        try:
            content = json.loads(text)
            if isinstance(content, dict):
                content = [content[str(number)] for number in range(len(content))]
            if not isinstance(content, list):
                raise TypeError(content)
            # ImageNet's are published as [WordNet ID, name]: take the name.
            names = [one_line(str(n[-1] if isinstance(n, list) else n)) for n in content]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise CommandError(
                f"{path} is not a JSON list of names or a JSON dict of names by index"
            ) from error
    else:
        names = [one_line(line.strip()) for line in text.splitlines() if line.strip()]
    if len(names) != count:
        raise CommandError(f"{path} names {len(names)} classes, but the model has {count}")
    return names


def read_text(path: Path, option: str) -> str:
    """The text of a file that an option names."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(f"{option} {path} is not UTF-8 text") from error
    except OSError as error:
        raise CommandError(f"cannot read {option} {path}: {error.strerror}") from error
