"""Convert our docstrings for mkdocstrings: Sphinx roles, tables and definitions become Markdown.

Docstrings are written to be read in the source. Markup that Markdown would show raw is converted
after griffe has read a docstring: ``:func:`na1d``` becomes a link if the site has a target, tables
of ``====`` become pipe tables, and indented definitions become definition lists.
"""

from __future__ import annotations

import html
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
RULE = re.compile(r"^=+(?:  +=+)+$")
TERM = re.compile(r"^``.*``$")


def resolve(obj: griffe.Object, name: str) -> str:
    """The full path of a name mentioned in the docstring of ``obj``."""
    if name.startswith(("backbones.", "ops.")):
        return name
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name


def link(obj: griffe.Object, name: str) -> str:
    """A link for autorefs, or plain code if nothing on the site has that name."""
    target, shown = html.escape(resolve(obj, name)), html.escape(name)
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'


def table(rows: list[str], rule: str) -> list[str]:
    """Convert the lines between two rules to a Markdown table without headings.

    A line may continue a cell.
    """
    starts = [match.start() for match in re.finditer("=+", rule)]
    cells: list[list[str]] = []
    for row in rows:
        parts = [row[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        if parts[0]:
            cells.append(parts)
        else:
            cells[-1] = [f"{old} {new}".strip() for old, new in zip(cells[-1], parts, strict=True)]
    blank = "|" + " |" * len(starts)
    return [blank, "|" + "---|" * len(starts), *("| " + " | ".join(row) + " |" for row in cells)]


def to_markdown(text: str) -> str:
    """Convert tables and definitions; keep everything else."""
    lines, out, i = text.split("\n"), [], 0
    while i < len(lines):
        line = lines[i]
        if RULE.match(line):
            end = lines.index(line, i + 1)
            out += ["", *table(lines[i + 1 : end], line), ""]
            i = end + 1
            continue
        if line.strip() == "::":  # the indented lines that follow are code in Markdown, too
            i += 1
            continue
        following = lines[i + 1] if i + 1 < len(lines) else ""
        if TERM.match(line) and following.startswith("    "):
            out += ["", line, ":   " + following.strip()]
            i += 2
            while i < len(lines) and lines[i].startswith("    "):
                out.append(lines[i])
                i += 1
            continue
        out.append(line)
        i += 1
    return "\n".join(out)


class Docstrings(griffe.Extension):
    """Rewrites each docstring once the whole package is loaded, so that names can be resolved."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = to_markdown(obj.docstring.value)
            obj.docstring.value = ROLE.sub(lambda match: link(obj, match[1]), text)
