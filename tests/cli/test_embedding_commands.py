"""search, duplicates and probe: what they print, write and draw."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from embedding_runs import Embedded, embed_images
from PIL import Image

from backbones.cli.main import main


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    return embed_images(tmp_path_factory.mktemp("commands"))


def run(*words: str | Path) -> int:
    return main(list(map(str, words)))


def has_colour(path: Path) -> bool:
    """Whether a picture shows more than text on white."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    return bool((spread > 60).mean() > 0.02)


def test_search(embedded, tmp_path, capsys):
    query = embedded.images / "val/class2/002.png"
    words = ["search", embedded.table, "--query", query, "--key", "train/class1/copy.png"]
    words += ["--top", "4", "--out", tmp_path / "a.png", "--html", tmp_path / "a.html"]
    assert run(*words, "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json") == 0
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["format"] == 1
    first, second = told["queries"]
    assert (first["query"], second["query"]) == ("train/class1/copy.png", str(query))
    # The key itself is not among what resembles it; a file that is in the table is.
    assert first["matches"][0] == {"key": "train/class1/004.png", "score": 1.0}
    assert second["matches"][0] == {"key": "val/class2/002.png", "score": 1.0}
    assert [len(entry["matches"]) for entry in (first, second)] == [4, 4]
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["key"] for row in rows[:4]] == [match["key"] for match in first["matches"]]
    assert [row["place"] for row in rows] == ["1", "2", "3", "4"] * 2
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["query", "score", "image"] and len(said) == 10
    assert said[2].split() == ["train/class1/copy.png", "1.000", "train/class1/004.png"]
    assert has_colour(tmp_path / "a.png")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<img") == 10 and "cannot be read" not in page


def test_search_draws_into_the_folder_by_itself(embedded, tmp_path):
    table = shutil.copytree(embedded.table, tmp_path / "table")
    assert run("search", table, "--key", "val/class0/000.png") == 0
    assert has_colour(table / "search.png")


def test_a_query_that_cannot_be_read(embedded, tmp_path, capsys):
    queries = tmp_path / "queries"
    queries.mkdir()
    (queries / "no.png").write_text("no image")
    words = ["search", embedded.table, "--query", queries, "--out", tmp_path / "a.png"]
    assert run(*words) == 1
    assert f"cannot read {queries / 'no.png'}: cannot identify" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
    shutil.copy(embedded.images / "val/class2/002.png", queries)
    assert run(*words) == 1
    assert "val/class2/002.png" in capsys.readouterr().out
    assert has_colour(tmp_path / "a.png")


def test_missing_images(embedded, tmp_path):
    """What was found is told all the same."""
    moved = shutil.move(embedded.images, tmp_path / "moved")
    try:
        words = ["search", embedded.table, "--key", "val/class0/000.png", "--top", "3"]
        assert run(*words, "--out", tmp_path / "a.png", "--html", tmp_path / "a.html") == 0
    finally:
        shutil.move(moved, embedded.images)
    assert not has_colour(tmp_path / "a.png")
    page = (tmp_path / "a.html").read_text()
    assert page.count("cannot be read") == 4 and "<img" not in page


def test_duplicates(embedded, tmp_path, capsys):
    out = {name: tmp_path / f"a.{name}" for name in ("png", "html", "csv", "json")}
    words = ["duplicates", embedded.table, "--threshold", "1", "--out", out["png"]]
    words += ["--html", out["html"], "--csv", out["csv"], "--json", out["json"]]
    assert run(*words) == 0
    ((first, second),) = json.loads(out["json"].read_text())["groups"]
    assert [first["key"], second["key"]] == ["train/class1/004.png", "train/class1/copy.png"]
    assert (first["height"], first["width"], first["similarity"]) == (40, 36, 1)
    rows = list(csv.reader(out["csv"].read_text().splitlines()))
    assert rows[0] == ["group", "key", "height", "width", "similarity"]
    assert rows[1] == ["1", "train/class1/004.png", "40", "36", "1.000000"]
    said = capsys.readouterr().out
    assert "1 groups; 1 of 19 images are redundant" in said
    assert has_colour(out["png"]) and out["html"].read_text().count("<img") == 2


def test_no_duplicates(embedded, tmp_path, capsys):
    from embedding_tables import make_table

    table = make_table(tmp_path / "table", np.eye(4, dtype=np.float32))
    assert run("duplicates", table, "--json", tmp_path / "a.json") == 0
    assert capsys.readouterr().out.startswith("0 groups; 0 of 4 images")
    assert json.loads((tmp_path / "a.json").read_text()) == {"format": 1, "groups": []}
    assert not (table / "duplicates.png").exists()


def test_probe(embedded, tmp_path, capsys):
    out = {name: tmp_path / f"a.{name}" for name in ("png", "html", "json")}
    words = ["probe", embedded.table, "--labels", "folder", "--split", "folder"]
    words += ["--out", out["png"], "--html", out["html"], "--json", out["json"]]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "19 images, 19 with one of 3 known classes: 13 for training, 6 held out" in said
    report = json.loads(out["json"].read_text())
    assert report["classes"] == ["class0", "class1", "class2"] and report["test"] == 6
    assert set(report["methods"]) == {"5 nearest", "linear probe"}
    for name, method in report["methods"].items():
        assert method["accuracy"] == pytest.approx(1 - len(method["mistakes"]) / 6)
        assert f"{name}" in said and f"{100 * method['accuracy']:.1f} %" in said
    assert "always the most frequent class" in said
    assert has_colour(out["png"])
    assert '<img class="picture" alt="5 nearest and linear probe' in out["html"].read_text()


@pytest.mark.parametrize(
    ("package", "words", "said"),
    [
        ("faiss", ["search", "--key", "val/class0/000.png", "--index", "hnsw"], "--index exact"),
        ("sklearn", ["probe", "--labels", "folder"], "pip install scikit-learn"),
        ("pyarrow", ["duplicates"], "pip install pyarrow"),
    ],
)
def test_missing_packages(package, words, said, embedded, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    command, *rest = words
    assert run(command, embedded.table, *rest, "--out", tmp_path / "a.png") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def contents(*folders: Path) -> dict[Path, bytes]:
    """All files in folders."""
    return {p: p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file()}


WORDS = {
    "search": ["--key", "train/class1/copy.png"],
    "duplicates": ["--index", "exact"],
    "probe": ["--labels", "folder", "--held-out", "0.5"],
}


@pytest.mark.parametrize("command", WORDS)
def test_files_of_others_are_replaced_only_when_asked(command, embedded, tmp_path, capsys):
    """Results of an earlier call are replaced, photographs and other tables are not."""
    endings = {"out": "png", "html": "html", "json": "json", "csv": "csv"}
    if command == "probe":
        del endings["csv"]
    files = {option: tmp_path / f"a.{ending}" for option, ending in endings.items()}
    words = [command, embedded.table, *WORDS[command], *(f"--{o}={p}" for o, p in files.items())]
    for _ in range(2):
        assert run(*words) == 0
    if command == "probe":  # half of each class
        assert 8 <= json.loads(files["json"].read_text())["test"] <= 10
    results = contents(tmp_path)
    for option, file in files.items():
        file.write_bytes(b"mine")
        assert run(*words) == 2
        said = capsys.readouterr().err
        assert f"--{option} {file} exists and is not an earlier" in said and "--overwrite" in said
        assert contents(tmp_path) == {**results, file: b"mine"}
        assert run(*words, "--overwrite") == 0
