"""Shared by the commands on embeddings: their arguments, outputs and pages."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from backbones.common.arguments import FILE, nonempty, nonempty_path
from backbones.common.errors import required
from backbones.common.messages import one_line
from backbones.common.outputs import (
    FIGURE,
    HTML,
    Kind,
    add_overwrite,
    csv_of,
    json_of,
    require_writable,
)
from backbones.embedding.page import write_page
from backbones.embedding.sheet import Thumbnails
from backbones.embedding.table import METADATA, count_rows, metadata, shard_paths


def add_outputs(parser: ArgumentParser, picture: str, what: str, rows: str = "") -> None:
    """FOLDER and the options of :func:`check_outputs`; ``--csv`` only if ``rows`` names its rows.

    ``--source`` is that of :func:`backbones.embedding.sources.reader_of`.
    """
    add = parser.add_argument
    add("folder", type=nonempty_path, metavar="FOLDER", help="written by `vision-backbones embed`")
    named = f"{what} (FOLDER/{picture})"
    add("--out", type=nonempty_path, metavar="PNG", help=named)
    add("--html", **FILE, help="HTML page in a single file")
    if rows:
        add("--csv", **FILE, help=f"write a row for each {rows}")
    add("--json", **FILE, help="write all results")
    text = "where the images are, if they or FOLDER were moved; then folders that links may lead to"
    add("--source", type=nonempty, nargs="+", default=[], metavar="SOURCE", help=text)
    add_overwrite(parser)


def check_outputs(
    options: Namespace,
    picture: str,
    key: str,
    columns: Sequence[str] = (),
    inputs: Iterable[Path | None] = (),
) -> Path:
    """The path of the image; outputs that could not or should not be written raise an error early.

    ``picture`` is its default name, ``key`` the first of the JSON file, ``columns`` those of the
    CSV file, and ``inputs`` what the command reads besides the tables.
    """
    tables = [options.folder, *filter(None, [getattr(options, "test", None)])]
    for folder in tables:
        shard_paths(folder)  # raises if it is not complete
    required("matplotlib", "the image")
    path: Path = options.out or options.folder / picture
    outputs: dict[str, tuple[Path | None, Kind]] = {
        "--out": (path, FIGURE),
        "--html": (options.html, HTML),
        "--json": (options.json, json_of(key)),
    }
    if columns:
        outputs["--csv"] = (options.csv, csv_of(*columns))
    described = (folder / METADATA for folder in tables)
    require_writable(outputs, [*inputs, *described], options.overwrite)
    return path


def write_html(
    options: Namespace, images: Thumbnails, title: str, facts: dict[str, str], *content: Any
) -> None:
    """Write ``--html``, if given: ``facts``, below those of the table, and content of ``images``.

    Says on standard error why images are not shown, if they were not to be read.
    """
    if options.html is not None:
        folder, said = options.folder, metadata(options.folder)
        weights = f"{said['weights']['file']} (SHA-256 {said['weights']['sha256'][:16]}…)"
        source = said["source"]
        place = f"{source['data']}, {source['split']}" if "data" in source else source["path"]
        own = {
            "embeddings": f"{count_rows(folder)} with {said['dim']} numbers each, in {folder}",
            "images": str(place),
            "model": f"{said['model']}, {weights}",
        }
        write_page(options.html, title, own | facts, *content)
    if images.refused:
        sys.stderr.write(f"note: images are not shown: {one_line(images.refused)}\n")
