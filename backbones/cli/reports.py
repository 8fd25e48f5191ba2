"""Reports of measurements as JSON: one row a line, rounded, with date, commit and kernels."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import re
import shutil
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbones.common.arguments import nonempty_path
from backbones.common.checks import format_problem
from backbones.common.errors import CommandError
from backbones.common.files import write_text_atomically
from backbones.common.outputs import FORMAT, REPORT, add_overwrite, require_writable
from ops.cpu.build import process
from ops.cpu.build.sources import SOURCES

Report = dict[str, Any]

# Significant digits of a measurement, and of what is compared with a target: ratios and scores.
_DIGITS, _COMPARED_DIGITS = 4, 5
_COMPARED = re.compile(
    r"speedup_over|times_ours|times_longer|ratio$|fraction_of_matmul$|top1$|agreement$|psnr$"
)


def rounded(value: Any, digits: int = _DIGITS) -> Any:
    """``value`` with its floats rounded to significant digits; NaN and infinities are None."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {
            str(key): rounded(item, _COMPARED_DIGITS if _COMPARED.search(str(key)) else digits)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def text_of(report: Mapping[str, Any]) -> str:
    """The text of a report's file: a line for each entry, and for each row of those that hold rows.

    An entry holds rows if any of its items is a list or a mapping. Reading the text and writing it
    again gives the same text.
    """
    entries = (f"{_line(key)}: {_entry(value)}" for key, value in rounded(report).items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _entry(value: Any) -> str:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, dict | list) for item in items):
        return _line(value)
    if isinstance(value, dict):
        lines = [f"{_line(key)}: {_line(item)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    return "[\n" + ",\n".join(map(_line, value)) + "\n]"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report atomically, as :func:`text_of` its format and the report, into any folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, text_of({"format": FORMAT, **report}))


def parsed(parser: ArgumentParser, arguments: Sequence[str], output: Path) -> Namespace:
    """The options of a benchmark; ``--output`` (default ``output``) may name an existing report."""
    parser.add_argument("--output", type=nonempty_path, default=output, help="a JSON file")
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    options.output = options.output.with_suffix(".json")
    written = {"--output": (options.output, REPORT)}
    require_writable(written, overwrite=options.overwrite, makes_folders=True)
    return options


def read_report(path: Path) -> Report:
    """A report that an earlier run wrote."""
    try:
        report: Report = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CommandError(f"{path} is not a report: {error}") from error
    if (problem := format_problem(report, FORMAT)) is not None:
        raise CommandError(f"{path} {problem}")
    return report


def load_report(path: Path, machine: Mapping[str, Any]) -> Report:
    """The report that earlier runs on this machine wrote to ``path``, or an empty one."""
    if not path.exists():
        return {"machine": dict(machine), "results": []}
    report = read_report(path)
    if not {"machine", "results"} <= report.keys():
        raise CommandError(f"{path} is not a benchmark report: it has no machine and results")
    there = report["machine"]  # older ones lack keys
    if any(there[key] != machine.get(key) for key in there):
        raise CommandError(
            f"{path} was measured on {there}, this is {dict(machine)}; choose another --output, or "
            "delete it"
        )
    return report


def put_rows(report: Report, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Put rows in the places of those with the same values of ``keys``, or else at the end."""
    places = {tuple(row[key] for key in keys): place for place, row in enumerate(report["results"])}
    for row in rows:
        place = places.setdefault(tuple(row[key] for key in keys), len(report["results"]))
        report["results"][place : place + 1] = [row]


@functools.cache
def kernel_digest(library: str) -> str:
    """A digest of the sources of a library of kernels; empty if there is none of that name."""
    if library not in process.sources.all():
        return ""
    digest = hashlib.sha256()
    for path in sorted(process.sources.files(library)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def is_older(row: Report) -> bool:
    """Whether a row was measured with other kernels than today's."""
    known = row.get("kernels")
    if not isinstance(known, dict):
        return True
    return any(kernel_digest(library) != digest for library, digest in known.items())


def provenance() -> dict[str, Any]:
    """``date``, ``commit`` if the library is in a checkout, and digests of loaded ``kernels``."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    commit = _commit(SOURCES.parents[1])
    loaded = sorted(name for name, state in process.states.items() if state.library is not None)
    kernels = {name: kernel_digest(name) for name in loaded}
    return {"date": today, **({"commit": commit} if commit else {}), "kernels": kernels}


def _commit(root: Path) -> str | None:
    """The commit of a checkout, marked if files were changed since; None outside of one."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    words = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    run = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=60)
    return run.stdout.strip() or None
