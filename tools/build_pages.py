"""Fill the marked places of README, CHANGELOG and docs/ with measurements, and NOTICE's rows.

    python tools/build_pages.py                   # make pages; changes only what is out of date
    python tools/build_pages.py --pictures        # also the pictures, from the same measurements
    python tools/build_pages.py --rewrite         # all JSON in docs/ as the tools write it
    python tools/build_pages.py --rewrite x.json  # a file of an older version, or written by hand

A place begins with a comment that names one of :data:`TABLES`, its reports, relative to docs/, and
options, or one of :data:`CLAIMS`, which read what they need; it ends with ``<!-- end -->``. A
``table`` stands in lines of its own, and a ``fact`` within a sentence:

    <!-- table: aims performance/zen5/models.json -->
    <!-- end -->

    measured on <!-- fact: machine performance/zen5/models.json --><!-- end -->.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import speeds
import tables_families
import tables_models
import tables_ops

from backbones.cli.reports import read_report, write_report
from backbones.common.arguments import nonempty_path
from backbones.common.console import Parser, guard
from backbones.common.errors import CommandError
from backbones.common.files import write_atomically, write_text_atomically

DOCS = Path(__file__).resolve().parent.parent / "docs"
CLAIMS = speeds.CLAIMS | tables_families.CLAIMS
TABLES = tables_models.TABLES | tables_ops.TABLES | tables_families.TABLES
_PLACE = re.compile(r"<!-- (table|fact): (.*?) -->(.*?)<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    """The pages that may have marked places."""
    at_the_top = (DOCS.parent / name for name in ("README.md", "CHANGELOG.md"))
    return [*filter(Path.is_file, at_the_top), *sorted(DOCS.rglob("*.md"))]


def places(text: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """Each marked place of a page: the function's name, its reports and its options."""
    found = []
    for _, call, _ in _PLACE.findall(text):
        name, *words = call.split()
        options = dict(word.split("=", 1) for word in words if "=" in word)
        found.append((name, [word for word in words if "=" not in word], options))
    return found


def filled(page: Path, docs: Path) -> str:
    """The text of a page with its marked places filled from the reports in ``docs``.

    Raises:
        ValueError: a place is not closed, or names what is not there.
    """
    text = page.read_text(encoding="utf-8")
    found = places(text)
    marks = len(re.findall(r"<!-- (?:table|fact): ", text))
    if not len(found) == marks == text.count("<!-- end -->"):
        raise ValueError(f"{page}: {marks} places begin, {text.count('<!-- end -->')} end")
    if at_start := re.search(r"^ *(?:[-*] )?<!-- fact: .*", text, re.MULTILINE):
        place = at_start[0].partition(" -->")[0].lstrip()
        raise ValueError(f"{page}: put a word before {place}: lines that begin with it are HTML")
    contents = iter([_content(page, docs, *place) for place in found])

    def put(place: re.Match[str]) -> str:
        kind, call, _ = place.groups()
        gap = "\n\n" if kind == "table" else ""
        return f"<!-- {kind}: {call} -->{gap}{next(contents)}{gap}<!-- end -->"

    return _PLACE.sub(put, text)


def _content(
    page: Path, docs: Path, name: str, files: Sequence[str], options: dict[str, str]
) -> str:
    try:
        if name in CLAIMS:
            return CLAIMS[name](docs, *files, **options)
        return TABLES[name](*(read(docs / file, docs) for file in files), **options)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{page}: {name} {' '.join(files)}: {error!r}") from error


def read(path: Path, docs: Path | None = None) -> Any:
    """A report. Below ``docs``, its machine has the name and restriction of ``cpus.json``."""
    report = read_report(path)
    file = path.relative_to(docs).as_posix() if docs else ""
    if docs and file.startswith("performance/") and "machine" in report:
        speeds.name_machine(report, file, docs)
    return report


def draw_all(docs: Path) -> None:
    """Draw those of the README and of learning."""
    found = {m["name"]: speeds.usual(docs, m["key"]) for m in speeds.cpus(docs)["machines"]}
    write_atomically(docs / "assets" / "speed.png", partial(speeds.draw_speed, found))
    tables_models.draw_learning(read(docs / "learning.json"), docs / "learning.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = Parser(description=__doc__)
    text = "write measurements anew instead (default: all of docs/)"
    parser.add_argument("--rewrite", nargs="*", type=nonempty_path, metavar="JSON", help=text)
    parser.add_argument("--pictures", action="store_true", help="also draw the figures")
    options = parser.parse_args(arguments)
    if options.rewrite is not None:
        for path in options.rewrite or sorted(DOCS.rglob("*.json")):
            write_report(path, read(path))
        return
    notice = DOCS.parent / "NOTICE"
    for page in (*pages(), notice):
        try:
            before = page.read_text(encoding="utf-8")
            text = tables_families.notice(before) if page == notice else filled(page, DOCS)
        except ValueError as error:
            raise CommandError(str(error)) from error
        if text != before:
            write_text_atomically(page, text)
            sys.stdout.write(f"filled {page.relative_to(DOCS.parent)}\n")
    if options.pictures:
        draw_all(DOCS)


if __name__ == "__main__":
    sys.exit(guard(main))
