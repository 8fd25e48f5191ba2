"""The rows of the families in NOTICE, from what a family declares.

A row takes its name from the title of the family's page, the citation from the module's docstring,
and source and licence from the figures of the original.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import backbones
from backbones.cli import parity

__all__ = ["notice"]

ROOT = Path(__file__).resolve().parent.parent
_CITATION = re.compile(r'([^.:]+(?: et al\.)?), "([^"]+)",\s+https://arxiv\.org/abs/(\d+\.\d+)')
_HEAD = "Model"  # the first word of NOTICE's table, which ends at an empty line


def notice(text: str) -> str:
    """The text of NOTICE with the rows of all families."""
    head, rest = re.split(rf"^(?={_HEAD})", text, maxsplit=1, flags=re.MULTILINE)
    heading, _, rest = rest.partition("\n")
    rows = [heading]
    for family in backbones.list_families():
        original = _original(family)
        source = f"{original['source'].partition('@')[0]}; licence: {original['licence']}"
        for authors, title, paper in _citations(family):
            row = f"{_title(family)}: {_last_names(authors)}, {title}, arXiv:{paper}. {source}"
            rows.append(textwrap.fill(row, 100, subsequent_indent="  ", break_on_hyphens=False))
    return head + "\n".join(rows) + "\n\n" + rest.partition("\n\n")[2]


def _original(family: str) -> dict[str, Any]:
    return parity.reference(*next(found for found in parity.variants() if found[0] == family))


def _title(family: str) -> str:
    page = ROOT / "docs" / "families" / f"{family}.md"
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _citations(family: str) -> list[tuple[str, str, str]]:
    """Authors, title and arXiv number of each paper that the module's docstring cites."""
    text = " ".join((getattr(backbones, family).__doc__ or "").split())
    found = [(a.strip(), t, p) for a, t, p in _CITATION.findall(text)]
    if not found:
        raise ValueError(f'{family}: cite the paper as Authors, "Title", https://arxiv.org/abs/…')
    return found


def _last_names(authors: str) -> str:
    if authors.endswith(" et al."):
        return f"{authors.removesuffix(' et al.').split()[-1]} et al."
    return ", ".join(name.split()[-1] for name in re.split(r", | and ", authors))
