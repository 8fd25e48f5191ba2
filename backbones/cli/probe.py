"""``vision-backbones probe``: how well the embeddings of a table separate classes."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from backbones.cli.results import add_outputs, check_outputs, write_html
from backbones.common.arguments import nonempty, nonempty_path, real, whole
from backbones.common.confusion import confusions, draw_confusions
from backbones.common.errors import CommandError
from backbones.common.messages import one_line
from backbones.common.outputs import json_text, write_if_asked
from backbones.common.tables import table
from backbones.embedding.page import Table
from backbones.embedding.probe import MOST_ROWS, Method, Report, probe
from backbones.embedding.sheet import Row, Thumbnails, Tile

EXAMPLE = "features/ --labels labels.csv --html probe.html"

_PICTURE = "confusion.png"
# Most mistakes of each method on the page, and most kinds of mistakes.
_MISTAKES, _KINDS = 120, 20


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    which: dict[str, Any] = {"type": nonempty, "metavar": "WHICH"}
    text = "a CSV, TSV or JSON file of keys and classes; folder: the name of an image's folder; "
    text += "source: the labels of digits, medmnist/, torch/, hfds/"
    add("--labels", required=True, help=text, **which)
    add("--test", type=nonempty_path, metavar="FOLDER", help="test on these embeddings")
    add("--test-labels", help="labels of --test, if not in --labels", **which)
    text = "a CSV, TSV or JSON file of keys and train/test; folder: train/, val/, test/ in keys"
    add("--split", help=text, **which)
    share = real(0, 0.99, above=True)
    add("--held-out", type=share, default=0.2, metavar="SHARE", help="share to test on (0.2)")
    add("--neighbors", type=whole(1), default=5, metavar="N", help="k of the kNN classifier (5)")
    text = "inverse regularisation of the linear probe (1)"
    add("--c", type=real(0, above=True), default=1.0, help=text)
    text = f"limit of train and of test rows ({MOST_ROWS:,})"
    add("--most-rows", type=whole(2), default=MOST_ROWS, metavar="N", help=text)
    add("--seed", type=whole(0, 2**32 - 1), default=0, metavar="N", help="random seed (0)")
    add_outputs(parser, _PICTURE, "confusion matrix")


def run(options: Namespace) -> int:
    folder: Path = options.folder
    if options.test is not None and options.split is not None:
        raise CommandError("give either --test or --split")
    if options.test is None and options.test_labels is not None:
        raise CommandError("--test-labels needs --test FOLDER")
    words = [options.labels, options.test_labels, options.split]
    files = [Path(word) for word in words if word not in (None, "folder", "source")]
    path = check_outputs(options, _PICTURE, "rows", inputs=files)
    chosen = ("test", "test_labels", "split", "held_out", "neighbors", "c", "most_rows", "seed")
    given = {name: getattr(options, name) for name in (*chosen, "source")}
    report = probe(folder, options.labels, **given)
    data = _data(report)
    sys.stdout.write(f"{data}\n{table(_HEAD, _figures(report))}")
    for note in (*report.notes, *(f"{m.name}: {m.note}" for m in report.methods if m.note)):
        sys.stderr.write(f"note: {one_line(note)}\n")
    write_if_asked(options.json, json_text(_entries(report)))
    title = f"Probe of {folder}, {len(report.classes)} classes"
    matrices = {method.name: method.confusion for method in report.methods}
    draw_confusions(path, title, report.classes, matrices)
    if options.html is not None:
        images = Thumbnails(options.test or folder, options.source)
        tables = [Table(_HEAD, _figures(report)), *map(_kinds, report.methods, [report] * 2)]
        picture = path.read_bytes() if path.is_file() else None
        told = f"{report.methods[0].name} and {report.methods[1].name}: confusion matrices"
        rows = _rows(images, report)
        write_html(options, images, title, {"data": data}, rows, tables, picture, told)
    return 0


_HEAD = ("method", "accuracy", "95 % interval", "mean of classes")


def _figures(report: Report) -> list[list[str]]:
    rows = [
        [
            method.name,
            f"{100 * method.accuracy:.1f} %",
            f"{100 * method.low:.1f} … {100 * method.high:.1f} %",
            f"{100 * method.per_class:.1f} %",
        ]
        for method in report.methods
    ]
    return [*rows, ["always the most frequent class", f"{100 * report.chance:.1f} %", "", ""]]


def _data(report: Report) -> str:
    return (
        f"{report.rows} images, {report.labelled} with one of {len(report.classes)} known classes: "
        f"{report.train} for training, {report.test} held out"
    )


def _entries(report: Report) -> dict[str, Any]:
    counts = {key: getattr(report, key) for key in ("rows", "labelled", "train", "test", "chance")}
    methods = {
        method.name: {
            **{k: getattr(method, k) for k in ("accuracy", "low", "high", "per_class", "note")},
            "confusions": confusions(method.confusion, report.classes),
            "mistakes": [
                {"key": m.key, "class": m.truth, "taken_for": m.answer}
                | {"confidence": round(m.confidence, 6)}
                for m in method.mistakes
            ],
        }
        for method in report.methods
    }
    return {**counts, "classes": report.classes, "notes": report.notes, "methods": methods}


def _group(method: Method, truth: str, answer: str) -> str:
    return f"{method.name}: {truth} → {answer}"


def _kinds(method: Method, report: Report) -> Table:
    """The most frequent confusions of a method."""
    found = confusions(method.confusion, report.classes)[:_KINDS]
    return Table(
        (f"{method.name}: class", "taken for", "images"),
        [(truth, answer, str(count)) for truth, answer, count in found],
        [_group(method, truth, answer) for truth, answer, _ in found],
    )


def _rows(find: Thumbnails, report: Report) -> list[Row]:
    rows = []
    for method in report.methods:
        shown = method.mistakes[:_MISTAKES]
        if not shown:
            continue
        tiles = [
            Tile(
                find(m.key),
                f"{m.truth} → {m.answer}   {100 * m.confidence:.0f} %",
                m.key,
                group=_group(method, m.truth, m.answer),
            )
            for m in shown
        ]
        count = len(method.mistakes)
        some = count > len(shown)
        which = f"the {len(shown)} most confident shown" if some else "most confident first"
        rows.append(Row(f"{method.name}: {count} mistakes, {which}", tiles))
    return rows
