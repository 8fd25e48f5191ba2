"""MkDocs hooks: insert the generated parts of pages, and add the libraries that the site ships.

A line ``<!-- generated: zoo -->`` in a page is replaced by the entry of ``GENERATED`` of that name.
"""

from __future__ import annotations

import functools
import re
import sys
from importlib import resources
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parent))

import zoo_page  # noqa: E402
from block_diagrams import diagram  # noqa: E402
from family_blocks import BLOCKS  # noqa: E402

TABLE_CODE = re.compile(r"(?<=[| ])`[^`\n]*\\\|[^`\n]*`")
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


@functools.cache
def _rows() -> list[zoo_page.Row]:
    return zoo_page.rows(zoo_page.latency_report())


# Functions of the name of the page's file, which for a family's page is the family.
GENERATED = {
    "machine": lambda page: zoo_page.machine_line(zoo_page.latency_report()),
    "zoo": lambda page: zoo_page.zoo(_rows()),
    "families": lambda page: zoo_page.families_table(_rows()),
    "variants": lambda page: zoo_page.variants_table(_rows(), page),
    "block": lambda page: diagram(BLOCKS[page]),
}


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

    return TABLE_CODE.sub(lambda code: code[0].replace("\\|", "|"), MARKER.sub(fill, markdown))
