"""Our docstrings for mkdocstrings: Sphinx's roles, tables and definitions turned into Markdown.

The docstrings are written for people who read the source. What Markdown would show raw is
translated here, when griffe has read a docstring: ``:func:`na1d``` becomes a link where the site
has a target, tables of ``====`` become pipe tables, and indented definitions a definition list.
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
    """The full path of a name that the docstring of ``obj`` mentions."""
    if name.startswith(("backbones.", "ops.")):
        return name
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name


def link(obj: griffe.Object, name: str) -> str:
    """A link for autorefs, or plain code where nothing on the site has that name."""
    target, shown = html.escape(resolve(obj, name)), html.escape(name)
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'


def table(rows: list[str], rule: str) -> list[str]:
    """Lines between two rules as a Markdown table without headings; a line may continue a cell."""
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
    """Tables and definitions; everything else stays."""
    lines, out, i = text.split("\n"), [], 0
    while i < len(lines):
        line = lines[i]
        if RULE.match(line):
            end = lines.index(line, i + 1)
            out += ["", *table(lines[i + 1 : end], line), ""]
            i = end + 1
            continue
        if line.strip() == "::":  # what follows is indented, which is code in Markdown too
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
