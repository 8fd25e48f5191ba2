"""A page of results as a single, self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from backbones.common.files import write_text_atomically
from backbones.common.messages import one_line
from backbones.embedding.sheet import Row, Tile

# Images below this many pixels are stored losslessly and enlarged without smoothing.
_TINY = 64


@dataclass
class Table:
    """A table on a page."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[str] = ()  # for each row, the ``Tile.group`` that its button filters by


def write_page(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    rows: Sequence[Row],
    tables: Sequence[Table] = (),
    picture: bytes | None = None,
    told: str = "",
) -> None:
    """Write a page with images and a field that filters them by name.

    ``picture`` is a PNG, described by ``told``.
    """
    parts = {
        "title": _text(title),
        "facts": "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items()),
        "tables": "\n".join(map(_table, tables)),
        "picture": "",
        "sections": "\n".join(map(_section, rows)),
    }
    if picture is not None:
        address = _address(picture, "png")
        parts["picture"] = f'<img class="picture" alt="{_text(told)}" src="{address}">'
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    write_text_atomically(path, re.sub(r"@(\w+)@", lambda found: parts[found[1]], template))


def _text(text: str) -> str:
    return html.escape(one_line(text, 10**9))


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.head)
    head += "<th></th>" if table.groups else ""
    rows = []
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row)
        if table.groups:
            group = _text(table.groups[number])
            button = f'<button type="button" data-group="{group}" aria-pressed="false">'
            cells += f"<td>{button}show</button></td>"
        rows.append(f"<tr>{cells}</tr>")
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _section(row: Row) -> str:
    items = "\n".join(map(_item, row.tiles))
    return f'<section><h2>{_text(row.caption)}</h2>\n<ul class="images">\n{items}\n</ul></section>'


def _item(tile: Tile) -> str:
    if tile.image is None:
        image = "cannot be read"
    else:
        tiny = ' class="tiny"' if max(tile.image.size) <= _TINY else ""
        image = f'<img{tiny} alt="" src="{_encoded(tile.image)}">'
    framed = ' class="framed"' if tile.framed else ""
    group = f' data-group="{_text(tile.group)}"' if tile.group else ""
    return (
        f'<li{framed}{group}><div class="square">{image}</div>'
        f"<b>{_text(tile.heading)}</b><span>{_text(tile.key)}</span></li>"
    )


def _encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    kind = "png" if max(image.size) <= _TINY else "jpeg"
    image.save(file, kind, quality=80)
    return _address(file.getvalue(), kind)


def _address(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
