"""``vision-backbones search``: the images of a table of embeddings most similar to given ones."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbones.cli.predict import find_images
from backbones.cli.results import add_outputs, check_outputs, write_html
from backbones.common.arguments import FILE, nonempty_path, whole
from backbones.common.errors import CommandError
from backbones.common.images import DECODE_ERRORS
from backbones.common.messages import one_line
from backbones.common.outputs import csv_text, json_text, write_if_asked
from backbones.common.tables import table
from backbones.embedding.query import embed_queries
from backbones.embedding.search import INDEXES, Match, search
from backbones.embedding.sheet import Row, Thumbnails, Tile, draw_sheet, small
from backbones.embedding.table import vectors_of

EXAMPLE = "features/ --query photo.jpg --out similar.png"

_PICTURE = "search.png"
_COLUMNS = ("query", "place", "key", "score")
# Most queries that are drawn, and most images of each.
_QUERIES, _TILES = 20, 47


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "default": []}
    add("--query", type=nonempty_path, metavar="IMAGE", help="image files or folders", **several)
    add("--key", metavar="KEY", help="keys of images in FOLDER", **several)
    add("--top", type=whole(1), default=12, metavar="N", help="results per query (12)")
    add("--index", choices=INDEXES, default="auto", help="exact, or hnsw beyond 1,000,000 rows")
    add("--checkpoint", **FILE, help="the weights, if they have moved")
    add_outputs(parser, _PICTURE, "contact sheet", "result")


def run(options: Namespace) -> int:
    """Run ``search``; 1 if a query could not be read."""
    if not options.query and not options.key:
        raise CommandError("give --query IMAGE, or the --key of an image in FOLDER")
    folder: Path = options.folder
    paths, skipped = find_images(options.query)
    inputs = [*options.query, *paths, options.checkpoint]
    path = check_outputs(options, _PICTURE, "queries", _COLUMNS, inputs)
    names: list[str] = []
    numbers: list[int | None] = []
    vectors = []
    unreadable: list[tuple[Path, str]] = []
    if options.key:
        try:
            own, embeddings = vectors_of(folder, options.key)
        except ValueError as error:
            raise CommandError(str(error)) from error
        names, numbers, vectors = [*options.key], [*own], [embeddings]
    if paths:
        queries = embed_queries(folder, paths, options.checkpoint)
        unreadable = queries.unreadable
        names += map(str, queries.paths)
        numbers += [None] * len(queries.paths)
        vectors.append(queries.vectors)
    wanted = np.concatenate(vectors)
    results = search(folder, wanted, options.top, options.index, numbers, progress=True)
    rows = [
        (name, place, match.key, match.score)
        for name, matches in zip(names, results, strict=True)
        for place, match in enumerate(matches, start=1)
    ]
    if rows:
        head = ("query", "score", "image")
        cells = [[one_line(n) if p == 1 else "", f"{s:.3f}", one_line(k)] for n, p, k, s in rows]
        sys.stdout.write(table(head, cells, last_left=True))
    write_if_asked(options.csv, csv_text(_COLUMNS, [(*row, f"{s:.6f}") for *row, s in rows]))
    entries = [
        {"query": name, "matches": [{"key": m.key, "score": round(m.score, 6)} for m in matches]}
        for name, matches in zip(names, results, strict=True)
    ]
    write_if_asked(options.json, json_text({"queries": entries}))
    if names:
        images = Thumbnails(folder, options.source)
        drawn = _rows(images, names, numbers, results)
        title = f"Most similar images in {folder}"
        draw_sheet(path, title, drawn)
        write_html(options, images, title, {"score": "cosine, at most 1"}, drawn)
    if skipped:
        sys.stderr.write(f"{skipped}\n")
    for query, reason in unreadable:
        sys.stderr.write(f"cannot read {one_line(str(query))}: {reason}\n")
    return 1 if unreadable else 0


def _rows(
    find: Thumbnails,
    names: Sequence[str],
    numbers: Sequence[int | None],
    results: Sequence[Sequence[Match]],
) -> list[Row]:
    """The rows to draw: each query followed by its matches."""
    rows = []
    for name, number, matches in list(zip(names, numbers, results, strict=True))[:_QUERIES]:
        try:
            image = small(Path(name)) if number is None else find(name)
        except DECODE_ERRORS:  # it disappeared after it was embedded
            image = None
        tiles = [Tile(image, "query", name, framed=True)]
        for place, match in enumerate(matches[:_TILES], start=1):
            tiles.append(Tile(find(match.key), f"{place}   {match.score:.3f}", match.key))
        rows.append(Row(name, tiles))
    return rows
