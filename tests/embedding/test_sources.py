"""Every kind of source yields each of its images once, and finds an image by its key."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from training_runs import make_images

from backbones.common.errors import DataError
from backbones.embedding.sources import Source, open_source, reader


def contents(source: Source) -> dict[str, bytes]:
    """Key → file of every image, through a reader created from the description alone."""
    opener = reader(source.description)
    found: dict[str, bytes] = {}
    for part in source.parts:
        for item in opener.items(part):
            assert item.key not in found
            file = item.open()
            assert not isinstance(file, Image.Image)
            with file:
                found[item.key] = file.read()
            again = opener.find(item.key)
            assert not isinstance(again, Image.Image)
            with again:
                assert again.read() == found[item.key]
    return found


def files(photos: Path) -> dict[str, bytes]:
    paths = sorted(p for p in photos.rglob("*") if p.is_file())
    return {str(p.relative_to(photos)): p.read_bytes() for p in paths}


def test_every_format_that_pillow_decodes(photos, tmp_path):
    """In folders and archives; what has no such ending is counted and named."""
    image = Image.open(photos / "000.png").convert("RGB")
    for ending in ("webp", "tif", "TIFF", "bmp", "gif", "jfif", "ppm", "tga", "jp2", "ico", "mpo"):
        image.save(photos / "sub" / f"x.{ending}")
    images = files(photos)
    for name in ("a.heic", "b.eps", "c", "labels.csv", "sub/d.txt"):
        (photos / name).touch()
    source = open_source(photos, rows=4)
    assert contents(source) == images
    assert source.images == 21
    assert [len(part) for part in source.parts] == [4, 4, 4, 4, 4, 1]
    told = "skipped 5 files without the ending of a known image format: a.heic, b.eps, c, …"
    assert str(source.skipped) == told
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(photos, ".")
        archive.addfile(link := tarfile.TarInfo("link.png"))
        link.type = tarfile.SYMTYPE
    opener = reader(open_source(tmp_path / "a.tar").description)
    found = [item.key for item in opener.items("a.tar")]
    assert {key.removeprefix("a.tar/./") for key in found if "link" not in key} >= set(images)
    assert str(opener.skipped).startswith("skipped 5 files without the ending")


def test_a_list_of_paths(photos):
    wanted = ["sub/004.jpg", "000.png", str(photos / "sub" / "001.jpg")]
    (photos / "list.txt").write_text("\n".join([*wanted, ""]))
    source = open_source(photos / "list.txt")
    found = contents(source)
    assert list(found) == wanted
    assert found["000.png"] == files(photos)["000.png"]


def test_tar_shards(photos, tmp_path):
    folder = tmp_path / "shards" / "deep"
    folder.mkdir(parents=True)
    names = list(files(photos))
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for name in names[number::2]:
                archive.add(photos / name, name)
                archive.addfile(tarfile.TarInfo(f"{name}.cls"), io.BytesIO())
    for place in (tmp_path / "shards", str(tmp_path / "shards" / "*" / "*.tar")):
        source = open_source(place)
        inner = "" if "*" in str(place) else "deep/"
        found = contents(source)
        assert source.images is None
        assert {key.partition(".tar/")[2]: data for key, data in found.items()} == files(photos)
        assert f"{inner}0.tar/{names[0]}" in found


def test_an_archive_that_breaks_off(photos, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in files(photos):
            archive.add(photos / name, name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = open_source(path)
    found = []
    with pytest.raises(DataError, match=r"a\.tar is not an uncompressed tar file"):
        for item in reader(source.description).items(source.parts[0]):
            found.append(item.key)
    assert found == [f"a.tar/{name}" for name in files(photos)][: len(found)]
    assert 0 < len(found) < 10


@pytest.mark.parametrize("wrapped", [False, True])
def test_parquet(photos, tmp_path, wrapped):
    data = list(files(photos).values())
    images = [{"bytes": d, "path": None} for d in data] if wrapped else data
    columns = pa.table({"label": list(range(10)), "picture": images})
    pa.parquet.write_table(columns, tmp_path / "a.parquet", row_group_size=3)
    source = open_source(tmp_path / "a.parquet", rows=4)
    assert contents(source) == {f"a.parquet/{row}": d for row, d in enumerate(data)}
    assert source.images == 10
    assert len(source.parts) == 2
    pa.parquet.write_table(columns, tmp_path / "a.parquet", row_group_size=5)
    assert open_source(tmp_path / "a.parquet", rows=4).description != source.description


@pytest.mark.parametrize(
    ("columns", "column", "told"),
    [
        ({"a": [b"1"], "b": [b"2"]}, None, "no single column of images; it has a, b"),
        ({"a": [1]}, None, "no single column of images; it has no binary columns"),
        ({"a": [b"1"], "b": [1]}, "b", "no column b of images; it has a"),
        ({"a": pa.array([], pa.binary())}, None, "have no rows"),
    ],
)
def test_columns_without_images(tmp_path, columns, column, told):
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=told):
        open_source(tmp_path, column=column)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "split", "count"),
    [("digits", "train", 1442), ("digits", "validation", 355), ("hfds", "validation", 3)],
)
def test_what_training_reads(name, split, count, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    images = make_images(tmp_path / "images", {"train": 6, "validation": 3})
    source = open_source("digits" if name == "digits" else f"hfds/{images}", 1000, split)
    opener = reader(source.description)
    items = [item for part in source.parts for item in opener.items(part)]
    assert len({item.key for item in items}) == source.images == count
    found = items[-1].open(), opener.find(items[-1].key)
    assert all(isinstance(image, Image.Image) for image in found)
    assert np.array_equal(*map(np.asarray, found))
    if name == "digits":
        with pytest.raises(KeyError):
            opener.find(f"digits/{split}[{count}]")


@pytest.mark.parametrize(
    ("files", "place", "told"),
    [
        ({}, "", "no image, .tar or .parquet below"),
        ({}, "absent", "absent does not exist"),
        ({}, "*.tar", r"no file matches .*\*\.tar"),
        ({}, "digits", "digits has the splits train and validation, not 'test'"),
        ({}, "medmnist/pathmnist", "pathmnist.npz is missing"),
        ({"a.parquet": "PAR1 and no more"}, "", "a.parquet is not a complete Parquet file"),
        ({"a.tar": "", "b.png": ""}, "", "contains 1 images and 1 .tar files: embed each kind sep"),
        ({"a.tar": "", "b.PARQUET": ""}, "", "contains 1 .tar files and 1 .parquet files"),
        ({"b.gif": "", "c.parquet": ""}, "", "contains 1 images and 1 .parquet files"),
        (
            {"a.heic": "", "b.eps": ""},
            "",
            "no image, .tar or .parquet below .*; skipped 2 files wi",
        ),
        ({"x.tar": None, "y.tar": ""}, "*.tar", r"x\.tar, which matches .*\*\.tar, is a folder"),
        ({"a.tar": "", "b.parquet": ""}, "?.*", "a.tar and b.parquet are of two kinds: embed each"),
        ({"a.tar": "", "b.png": ""}, "?.*", r"b\.png is not a source of images"),
        ({"a.txt": " \n"}, "a.txt", "the list .* is empty"),
        ({"a.txt": "x\ny\nx\n"}, "a.txt", "a.txt has x twice"),
        ({"a.zip": ""}, "a.zip", "a.zip is not a source of images: give a folder"),
    ],
)
def test_invalid_sources(tmp_path, files, place, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        if text is None:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text(text)
    is_set = place in ("digits", "medmnist/pathmnist")
    with pytest.raises(DataError, match=told):
        open_source(place if is_set else tmp_path / place, split="test")
