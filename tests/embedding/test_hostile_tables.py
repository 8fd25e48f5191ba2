"""Any metadata and any shards: a status that fits, an error in one line, no trace, nothing changed.

Pictures are not drawn, which would take most of the time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from embedding_runs import make_photos, tiny_checkpoint, words
from fuzzing import anything, damage, fuzz
from hypothesis import given
from hypothesis import strategies as st

from backbones.cli.main import main
from backbones.embedding import table
from backbones.embedding.checksum import CHECKSUM_KEY
from backbones.embedding.search import search

EXAMPLES = 1000
COMMANDS = ["search", "search", "duplicates", "duplicates", "probe", "query", "hnsw", "embed"]


class Given(NamedTuple):
    """What commands read, in the current folder: they must not change it."""

    photos: Path
    checkpoint: Path
    table: Path

    def files(self) -> dict[Path, bytes]:
        """Their contents."""
        folders = (self.photos, self.checkpoint.parent, self.table)
        return {p: p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    folder = tmp_path_factory.mktemp("hostile")
    photos = make_photos(folder / "photos", 9)
    (photos / "none.jpg").write_text("no image")
    checkpoint = tiny_checkpoint(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(words(photos, folder / "table", checkpoint)) == 1
        search(folder / "table", np.ones((1, 32), np.float32), index="hnsw")
        for name in ("search.draw_sheet", "duplicates.draw_sheet", "probe.draw_confusions"):
            patch.setattr(f"backbones.cli.{name}", lambda *args: None)
        yield Given(photos, checkpoint, folder / "table")


def run(inputs: Given, folder: Path, command: str) -> tuple[int, str]:
    """Status and standard error."""
    key = ["search", str(folder), "--key", "000.png", "--html", str(folder.parent / "a.html")]
    line = {
        "search": key,
        "query": ["search", str(folder), "--query", str(inputs.photos / "000.png")],
        "hnsw": [*key, "--index", "hnsw"],
        "duplicates": ["duplicates", str(folder), "--csv", str(folder.parent / "a.csv")],
        "probe": ["probe", str(folder), "--labels", str(inputs.photos.parent / "labels.json")],
        "embed": words(inputs.photos, folder, inputs.checkpoint),
    }[command]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(line)
    return status, err.getvalue()


def check(
    inputs: Given, command: str, spoil: Callable[[Path], None], seen: list[int], mended: bool
) -> None:
    """Run a command on a damaged copy of the table.

    Args:
        mended: whether the table is intact again after ``embed``.
    """
    with tempfile.TemporaryDirectory(dir=inputs.photos.parent) as place:
        folder = Path(place) / "table"
        shutil.copytree(inputs.table, folder)
        spoil(folder)
        before = _held(folder)
        status, said = run(inputs, folder, command)
        told = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status in (0, 1, 2) and "Traceback" not in said
        assert len(told) == (status == 2)
        if told:
            assert said.endswith(f"{told[0]}\n") and len(told[0]) < 3000
        if command != "embed":
            assert _held(folder) == before
        elif status < 2 and mended:
            keys, vectors = table.load(folder)
            wanted = table.load(inputs.table)
            assert keys == wanted[0] and np.array_equal(vectors, wanted[1])
        seen.append(status)


def _held(folder: Path) -> dict[Path, bytes]:
    paths = (folder / "metadata.json", *(folder / "shards").glob("*"))
    return {path: path.read_bytes() for path in paths if path.is_file()}


# -- metadata --------------------------------------------------------------------------------------

ANY_TEXT = st.one_of(
    st.text(max_size=8),
    st.text(st.characters(), max_size=4),  # surrogates, too
    st.sampled_from(["", "320", "/etc", "../..", "a\0b", "\ud800", "nan", "float16", "int8"]),
    st.sampled_from(["folder", "list", "tar", "parquet", "training", "digits", "hfds/x"]),
)
ANYTHING = anything(ANY_TEXT)


@st.composite
def edits(draw: st.DrawFn, content: Any) -> str:
    """The text of a ``metadata.json`` with other values, fewer fields or other characters."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 2))):
        inner = content
        name = draw(st.sampled_from(sorted(inner)))
        while isinstance(inner[name], dict) and inner[name] and draw(st.integers(0, 3)):
            inner = inner[name]
            name = draw(st.sampled_from(sorted(inner)))
        if draw(st.integers(0, 5)):
            inner[name] = draw(ANYTHING)
        elif len(content) > 1:
            del inner[name]
    text = json.dumps(content, ensure_ascii=draw(st.booleans()))
    if not draw(st.integers(0, 4)):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 20)))
        text = text[:start] + draw(ANY_TEXT) + text[end:]
    return text


@pytest.mark.slow
def test_any_metadata(whole):
    before, seen = whole.files(), list[int]()
    _label(whole)
    content = json.loads((whole.table / "metadata.json").read_text())

    @fuzz(EXAMPLES)
    @given(edits(content), st.sampled_from(COMMANDS))
    def one(text: str, command: str) -> None:
        data = text.encode(errors="surrogatepass")
        check(whole, command, lambda folder: _write(folder / "metadata.json", data), seen, True)

    one()
    assert whole.files() == before
    assert seen.count(2) > EXAMPLES // 4 and seen.count(0) > EXAMPLES // 50


def _label(whole: Given) -> None:
    labels = {key: "ab"[number % 2] for number, key in enumerate(table.load(whole.table)[0])}
    (whole.photos.parent / "labels.json").write_text(json.dumps(labels))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _change(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


# -- shards ----------------------------------------------------------------------------------------


@st.composite
def damages(draw: st.DrawFn) -> tuple[Callable[[Path], None], bool]:
    """A change of a table's shards, and whether it can be noticed for sure."""
    kind = draw(st.sampled_from([_bytes_changed, _unsigned, _rebuilt, _rebuilt, _no_file]))
    return kind(draw), kind is _bytes_changed


def _bytes_changed(draw: st.DrawFn) -> Callable[[Path], None]:
    number, change = draw(st.integers(0, 2)), draw(damage())
    return lambda folder: _change(table.shard_path(folder, number), change)


def _without_checksum(path: Path) -> None:
    with pa.parquet.ParquetFile(path) as file:
        whole, kept = file.read(), file.metadata.metadata
    kept = {k: v for k, v in kept.items() if k not in (CHECKSUM_KEY, b"ARROW:schema")}
    pa.parquet.write_table(whole.replace_schema_metadata(kept), path, compression="none")


def _unsigned(draw: st.DrawFn) -> Callable[[Path], None]:
    """Of an earlier version, without checksums: only what Arrow and the checks of rows notice."""
    number, change = draw(st.integers(0, 2)), draw(damage())

    def spoil(folder: Path) -> None:
        _without_checksum(table.shard_path(folder, number))
        _change(table.shard_path(folder, number), change)

    return spoil


COLUMNS = {
    "key": [pa.string(), pa.large_string(), pa.binary(), pa.int32(), pa.null()],
    "height": [pa.int32(), pa.int64(), pa.string(), pa.float32(), pa.list_(pa.int32())],
    "width": [pa.int32(), pa.uint32(), pa.bool_()],
    "embedding": [
        *(pa.list_(pa.float32(), 32), pa.list_(pa.float32(), 3), pa.list_(pa.float32(), 1)),
        *(pa.list_(pa.float16(), 32), pa.list_(pa.float32()), pa.float32(), pa.string()),
    ],
}


def _rebuilt(draw: st.DrawFn) -> Callable[[Path], None]:
    """Columns of other types, missing ones, values that are missing, other metadata."""
    number, rows = draw(st.integers(0, 2)), draw(st.integers(0, 5))
    kinds = {name: draw(st.sampled_from([types[0]] * 4 + types)) for name, types in COLUMNS.items()}
    names = draw(st.permutations(sorted(kinds))) if draw(st.booleans()) else list(kinds)
    names = names[: draw(st.sampled_from([4, 4, 4, 3, 0]))]
    gaps = draw(st.sets(st.sampled_from(names), max_size=2)) if names else set()
    nullable = draw(st.booleans())
    noted = draw(st.sampled_from([b"[]", b"[]", b"null", b"[[1]]", b"{", b"\xff", None]))
    stamped = draw(st.integers(0, 9)) > 0

    def spoil(folder: Path) -> None:
        path = table.shard_path(folder, number)
        facts = (
            {table.IDENTITY_KEY: table.identity(table.metadata(folder)).encode()} if stamped else {}
        )
        facts |= {} if noted is None else {table.CORRUPT_KEY: noted}
        columns, fields = [], []
        for name in names:
            values = [None if name in gaps and row == 1 else row for row in range(rows)]
            columns.append(pa.array([_value(kinds[name], v) for v in values], kinds[name]))
            holes = columns[-1].null_count > 0 or nullable or pa.types.is_null(kinds[name])
            fields.append(pa.field(name, kinds[name], nullable=holes))
        schema = pa.schema(fields, metadata=facts)
        pa.parquet.write_table(pa.Table.from_arrays(columns, schema=schema), path)

    return spoil


def _value(kind: pa.DataType, value: int | None) -> Any:
    if value is None or pa.types.is_null(kind):
        return None
    if pa.types.is_fixed_size_list(kind):
        number = np.float16(value) if pa.types.is_float16(kind.value_type) else float(value)
        return [number] * kind.list_size
    if pa.types.is_list(kind):
        return [value]
    if pa.types.is_boolean(kind):
        return value > 1
    if pa.types.is_binary(kind):
        return b"\xff%d" % value
    return f"{value}.png" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else value


def _no_file(draw: st.DrawFn) -> Callable[[Path], None]:
    number = draw(st.integers(0, 2))
    kind = draw(st.sampled_from(["gone", "empty", "pipe", "folder", "loop", "other", "swapped"]))

    def spoil(folder: Path) -> None:
        path, other = table.shard_path(folder, number), table.shard_path(folder, (number + 1) % 3)
        data = other.read_bytes()
        path.unlink()
        if kind == "empty":
            path.touch()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "other":
            path.symlink_to("/dev/zero")
        elif kind == "swapped":
            path.write_bytes(data)

    return spoil


@pytest.mark.slow
def test_any_shards(whole):
    before, seen = whole.files(), list[int]()
    _label(whole)

    @fuzz(EXAMPLES)
    @given(damages(), st.sampled_from(COMMANDS))
    def one(damage: tuple[Callable[[Path], None], bool], command: str) -> None:
        check(whole, command, damage[0], seen, damage[1])

    one()
    assert whole.files() == before
    assert seen.count(2) > EXAMPLES // 4 and seen.count(0) + seen.count(1) > EXAMPLES // 20
