"""The rule about output files: no input, the ending of its kind, nothing else replaced unasked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backbones.common.errors import CommandError
from backbones.common.figures import new_figure, save_figure
from backbones.common.outputs import (
    FIGURE,
    HTML,
    ONNX,
    PT2,
    Kind,
    csv_of,
    json_of,
    json_text,
    overwritten,
    require_writable,
)

CSV, JSON = csv_of("query", "place"), json_of("query")


def refusal(outputs: dict[str, tuple[Path | None, Kind]], *inputs: Path, **more: Any) -> str:
    with pytest.raises(CommandError) as raised:
        require_writable(outputs, inputs, **more)
    return str(raised.value)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with one image, and links into it and to it."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "a" / "1.png")
    (tmp_path / "link.png").symlink_to("photos/a/1.png")
    (tmp_path / "linked").symlink_to("photos")
    return tmp_path / "photos"


def test_new_files(tmp_path):
    def never() -> Iterator[Path]:
        raise AssertionError("new files overwrite nothing")
        yield tmp_path

    outputs = {"--csv": (tmp_path / "a.csv", CSV), "--cam": (None, FIGURE)}
    require_writable({**outputs, "--json": (tmp_path / "B.JSON", JSON)}, never())
    require_writable({"--csv": (tmp_path / "no" / "a.csv", CSV)}, makes_folders=True)


def test_places(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "lost.csv").symlink_to("no/a.csv")
    csv = tmp_path / "a.csv"
    same = tmp_path / "." / "x" / ".." / "a.csv"
    assert "--csv and --json are both" in refusal({"--csv": (csv, CSV), "--json": (same, JSON)})
    assert "is a folder" in refusal({"--csv": (tmp_path / "folder.csv", CSV)})
    missing = tmp_path / "no" / "a.csv"
    assert f"there is no folder {tmp_path / 'no'}" in refusal({"--csv": (missing, CSV)})
    assert "there is no folder" in refusal({"--csv": (tmp_path / "lost.csv", CSV)})
    below = {"--csv": (tmp_path / "file" / "a.csv", CSV)}
    assert "is not a folder" in refusal(below, makes_folders=True)
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert "cannot be written to" in refusal({"--csv": (csv, CSV)})


def test_devices(tmp_path):
    require_writable({"--csv": (Path("/dev/null"), CSV)}, [Path("/dev/null")])
    os.mkfifo(tmp_path / "pipe")
    require_writable({"--csv": (tmp_path / "pipe", CSV)})
    assert "is not a regular file" in refusal({"--out": (Path("/dev/null"), ONNX)}, streams=False)


@pytest.mark.parametrize("name", ["w.pth", "a", "a.csv.bak", ".csv", "a.json"])
def test_endings(name, tmp_path):
    (tmp_path / "link.csv").symlink_to(name)
    for file in (tmp_path / name, tmp_path / "link.csv"):
        assert "must end in .csv" in refusal({"--csv": (file, CSV)}, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_inputs(photos, tmp_path, overwrite):
    image, link = photos / "a" / "1.png", tmp_path / "link.png"
    os.link(image, tmp_path / "hard.png")
    for output in (image, link, tmp_path / "linked" / "a" / "1.png"):
        for read in (image, link, photos, tmp_path / "linked", photos / "a"):
            message = refusal({"--out": (output, FIGURE)}, read, overwrite=overwrite)
            assert message.startswith(f"--out {output} would overwrite ")
    assert "would overwrite" in refusal({"--out": (tmp_path / "hard.png", FIGURE)}, image)
    require_writable({"--out": (photos / "a" / "new.png", FIGURE)}, [photos, None])


def test_files_beside_images_are_no_images(photos):
    (photos / "old.csv").write_text("query,place\n")
    require_writable({"--csv": (photos / "old.csv", CSV)}, [photos])
    assert overwritten([photos / "old.csv"], [photos]) is None
    assert overwritten([photos / "old.csv"], [photos / "old.csv"]) is not None


def results(folder: Path) -> dict[str, tuple[Path, Kind]]:
    """An earlier result of each kind."""
    save_figure(new_figure(1, 1), folder / "a.png")
    page = Path(__file__).parents[2] / "backbones" / "embedding" / "page.html"
    shutil.copy(page, folder / "a.html")
    (folder / "a.csv").write_text("query,place,key\nx,1,y\n")
    (folder / "a.json").write_text(json_text({"query": 3}))
    (folder / "empty.csv").touch()
    (folder / "a.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    (folder / "a.pt2").write_bytes(b"PK\x03\x04")
    kinds = {".png": FIGURE, ".html": HTML, ".csv": CSV, ".json": JSON, ".onnx": ONNX, ".pt2": PT2}
    return {path.name: (path, kinds[path.suffix]) for path in folder.iterdir()}


def test_earlier_results_are_replaced(tmp_path):
    for name, output in results(tmp_path).items():
        require_writable({name: output}, overwrite=False)


@pytest.mark.parametrize(
    "content",
    [
        b"key,class\n1.png,cat\n",
        b'{"images": [], "query": 1}',
        b"[]",
        b"\x80\x02pickle",
        b"<!doctype html><title>mine</title>",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR of a photograph",
    ],
)
def test_other_files_are_replaced_only_when_asked(content, tmp_path):
    for name, (path, kind) in results(tmp_path).items():
        path.write_bytes(content)
        told = "exists and is not an earlier result: choose another name, or replace it with "
        assert told in refusal({name: (path, kind)}, overwrite=False)
        assert refusal({name: (path, kind)}).endswith("choose another name")
        require_writable({name: (path, kind)}, overwrite=True)
        assert path.read_bytes() == content
