"""``vision-backbones duplicates``: groups of images whose embeddings are nearly equal."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from backbones.cli.results import add_outputs, check_outputs, write_html
from backbones.common.arguments import real
from backbones.common.messages import one_line
from backbones.common.outputs import csv_text, json_text, write_if_asked
from backbones.common.tables import table
from backbones.embedding.duplicates import THRESHOLD, Member, find_duplicates
from backbones.embedding.search import INDEXES
from backbones.embedding.sheet import Row, Thumbnails, Tile, draw_sheet
from backbones.embedding.table import count_rows

EXAMPLE = "features/ --threshold 0.98 --csv duplicates.csv"

_PICTURE = "duplicates.png"
_KEPT = ("key", "height", "width")
_COLUMNS = ("group", *_KEPT, "similarity")
# Most groups in the picture and on the page, and most images of each.
_DRAWN, _SHOWN, _TILES = 24, 200, 16


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    text = f"minimum cosine similarity ({THRESHOLD})"
    add("--threshold", type=real(0, 1, above=True), default=THRESHOLD, metavar="C", help=text)
    add("--index", choices=INDEXES, default="auto", help="exact, or hnsw beyond 200,000 rows")
    add_outputs(parser, _PICTURE, "contact sheet of the groups", "image in a group")


def run(options: Namespace) -> int:
    folder: Path = options.folder
    path = check_outputs(options, _PICTURE, "groups", _COLUMNS)
    groups = find_duplicates(folder, options.threshold, options.index, progress=True)
    members = [
        (number, place, m)
        for number, group in enumerate(groups, start=1)
        for place, m in enumerate(group)
    ]
    if groups:
        head = ("group", "similarity", "size", "image")
        cells = [
            ["" if place else str(number), f"{m.similarity:.3f}", _size(m), one_line(m.key)]
            for number, place, m in members
        ]
        sys.stdout.write(table(head, cells, last_left=True))
    extra = sum(map(len, groups)) - len(groups)
    summary = f"{len(groups)} groups; {extra} of {count_rows(folder)} images are redundant"
    sys.stdout.write(f"{summary}\n")
    rows = [(n, m.key, m.height, m.width, f"{m.similarity:.6f}") for n, _, m in members]
    write_if_asked(options.csv, csv_text(_COLUMNS, rows))
    entries = [
        [{**{k: getattr(m, k) for k in _KEPT}, "similarity": round(m.similarity, 6)} for m in group]
        for group in groups
    ]
    write_if_asked(options.json, json_text({"groups": entries}))
    if groups:
        images = Thumbnails(folder, options.source)
        shown = _rows(images, groups[: _DRAWN if options.html is None else _SHOWN])
        title = f"Near-duplicates in {folder}"
        draw_sheet(path, title, shown[:_DRAWN])
        details = {"threshold": f"cosine of at least {options.threshold:g}", "found": summary}
        write_html(options, images, title, details, shown)
    return 0


def _size(member: Member) -> str:
    return f"{member.height}×{member.width}"


def _rows(find: Thumbnails, groups: Sequence[Sequence[Member]]) -> list[Row]:
    rows = []
    for number, group in enumerate(groups, start=1):
        left_out = f", {_TILES} of them shown" if len(group) > _TILES else ""
        tiles = [
            Tile(find(m.key), f"{m.similarity:.3f}   {_size(m)}", m.key) for m in group[:_TILES]
        ]
        rows.append(Row(f"group {number}: {len(group)} images{left_out}", tiles))
    return rows
