"""The site: parts of pages that only it has, the libraries that it ships, docstrings as Markdown.

MkDocs' hooks and griffe's extension. In a page, ``<!-- generated: zoo -->`` is replaced by the
entry of ``GENERATED`` of that name, and a comment that begins with ``block`` by the diagrams that
it describes, see ``block_diagrams.parse``.

Docstrings are written to be read in the source. Markup that Markdown would show raw is converted
after griffe has read a docstring: ``:func:`na1d``` becomes a link if the site has a target, tables
of ``====`` become pipe tables, and indented definitions become definition lists.
"""

from __future__ import annotations

import functools
import html
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import speeds  # noqa: E402
import zoo_page  # noqa: E402
from block_diagrams import diagram, parse  # noqa: E402

TABLE_CODE = re.compile(r"(?<=[| ])`[^`\n]*\\\|[^`\n]*`")
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
BLOCK = re.compile(r"^<!-- block\n(.*?)-->$", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
RULE = re.compile(r"^=+(?:  +=+)+$")
TERM = re.compile(r"^``.*``$")


@functools.cache
def _speeds() -> list[speeds.Speeds]:
    return speeds.measured(zoo_page.DOCS)


@functools.cache
def _rows() -> list[zoo_page.Row]:
    return zoo_page.rows(_speeds())


# Functions of the name of the page's file, which for a family's page is the family.
GENERATED = {
    "machine": lambda page: zoo_page.machine_line(_speeds()),
    "cpus": lambda page: zoo_page.look_up(),
    "speed": lambda page: zoo_page.speed_table(_speeds()),
    "zoo": lambda page: zoo_page.zoo(_rows()),
    "families": lambda page: zoo_page.families_table(_rows()),
    "variants": lambda page: zoo_page.variants_table(_rows(), page),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the families' pages, under their titles."""
    (section,) = (entry["Families"] for entry in config.nav or () if "Families" in entry)
    pages = sorted((Path(config.docs_dir) / "families").glob("*.md"))
    section += [f"families/{page.name}" for page in pages if page.stem != "index"]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add plotly.js from its Python package."""
    script = resources.files("plotly") / "package_data" / "plotly.min.js"
    files.append(File.generated(config, "assets/plotly.min.js", content=script.read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert the generated parts, and unescape pipes in the code of tables."""
    name = Path(page.file.src_uri).stem

    def fill(match: re.Match[str]) -> str:
        if match[1] not in GENERATED:
            raise PluginError(f"{page.file.src_uri}: nothing is generated as {match[1]!r}")
        return GENERATED[match[1]](name)

    markdown = BLOCK.sub(lambda found: diagram(parse(found[1])), MARKER.sub(fill, markdown))
    return TABLE_CODE.sub(lambda code: code[0].replace("\\|", "|"), markdown)


# -- docstrings ----------------------------------------------------------------------------------


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
