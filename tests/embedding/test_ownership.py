"""Images are read only from the source of a table, and only if the user said where that is."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from embedding_runs import make_photos, tiny_checkpoint, words
from embedding_tables import make_table

from backbones.cli.main import main
from backbones.embedding import ownership, table
from backbones.embedding.labels import labels_of
from backbones.embedding.sources import ForeignError, OutsideError, image_bytes
from backbones.embedding.thumbnails import Thumbnails


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a key."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    photos = make_photos(tmp_path / "photos", 4)
    shutil.copy(photos / "000.png", tmp_path / "secret.png")
    return photos


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def foreign(tmp_path: Path, kind: str, root: Path, *keys: str, **more: str) -> Path:
    """A table that nobody sealed."""
    source = {"kind": kind, "path": str(root), **more}
    vectors = np.random.default_rng(0).normal(size=(len(keys), 3)).astype(np.float32)
    return make_table(tmp_path / "foreign", vectors, list(keys), source=source)


def html_of(folder: Path, key: str, *more: str | Path) -> str:
    page = folder.parent / "a.html"
    out = ["--out", folder.parent / "a.png", "--html", page]
    assert main(list(map(str, ["search", folder, "--key", key, *out, *more]))) == 0
    return page.read_text()


def test_a_source_from_elsewhere_is_asked_for(tmp_path, photos, capsys):
    folder = foreign(tmp_path, "folder", photos, "000.png", "003.png")
    told = f"{folder} was made by somebody else, on another machine or by an earlier version, so "
    told += "its images are not read from where it says, "
    with pytest.raises(OSError, match=told):
        image_bytes(folder, "000.png")
    assert image_bytes(folder, "000.png", [photos]) == (photos / "000.png").read_bytes()
    page = html_of(folder, "000.png")
    assert page.count("cannot be read") == 2 and "<img" not in page
    said = capsys.readouterr().err
    assert said.startswith(f"note: images are not shown: {told}") and said.count("\n") == 1
    assert html_of(folder, "000.png", "--source", photos).count("<img") == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(ForeignError, match=r"--source .*none does not exist"):
        image_bytes(folder, "000.png", [tmp_path / "none"])


@pytest.mark.parametrize("command", ["duplicates", "probe"])
def test_other_reports_ask_too(command, tmp_path, photos, capsys):
    keys = [f"{name}/{i}.png" for name in "ab" for i in range(6)]
    for key in keys:
        (photos / key).parent.mkdir(exist_ok=True)
        shutil.copy(photos / "000.png", photos / key)
    source = {"kind": "folder", "path": str(photos)}
    folder = make_table(tmp_path / "t", np.ones((12, 3), np.float32), keys, source=source)
    line = [command, folder, "--out", tmp_path / "a.png", "--html", tmp_path / "a.html"]
    line += ["--labels", "folder"] if command == "probe" else []
    assert main(list(map(str, line))) == 0
    assert "note: images are not shown: " in capsys.readouterr().err
    assert '<div class="square"><img' not in (tmp_path / "a.html").read_text()
    assert main(list(map(str, [*line, "--source", photos]))) == 0
    assert "not shown" not in capsys.readouterr().err
    assert '<div class="square"><img' in (tmp_path / "a.html").read_text()


def _tar(folder: Path, *names: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in names:
            archive.add(name, name.name)


def _parquet(folder: Path, *names: Path) -> None:
    data = pa.table({"image": [name.read_bytes() for name in names]})
    pa.parquet.write_table(data, folder / "a.parquet")


def seal(folder: Path) -> list[Path]:
    """Make a table the user's own, which needs no ``--source``."""
    content = table.metadata(folder)
    table.write_metadata(folder, {**content, "seal": ownership.seal(content)})
    return []


@pytest.mark.parametrize("sealed", [False, True])
def test_pages_leave_out_what_is_elsewhere(sealed, tmp_path, photos, capsys):
    folder = foreign(tmp_path, "folder", photos, "../secret.png", "000.png")
    source = seal(folder) if sealed else ["--source", photos]
    page = html_of(folder, "000.png", *source)
    assert (page.count("cannot be read"), page.count("<img")) == (1, 1)
    said = capsys.readouterr().err
    assert "note: images are not shown: " in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "make", "key"),
    [
        ("folder", None, "../secret.png"),
        ("folder", None, "sub/../../secret.png"),
        ("folder", None, "{0}/secret.png"),
        ("folder", None, "link.png"),
        ("folder", None, "linked/secret.png"),
        ("list", None, "../secret.png"),
        ("list", None, "{0}/secret.png"),
        ("tar", _tar, "../a.tar/secret.png"),
        ("tar", _tar, "{0}/a.tar/secret.png"),
        ("tar", _tar, "linked/a.tar/secret.png"),
        ("parquet", _parquet, "../a.parquet/0"),
        ("parquet", _parquet, "linked/a.parquet/0"),
    ],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_keys_stay_below_the_source(kind, make, key, sealed, tmp_path, photos):
    """Even in the user's own table, where somebody may have edited the keys."""
    (photos / "link.png").symlink_to(tmp_path / "secret.png")
    (photos / "linked").symlink_to(tmp_path)
    if make is not None:
        make(tmp_path, tmp_path / "secret.png")
    key = key.replace("{0}", str(tmp_path))
    more = {"column": "image"} if kind == "parquet" else {}
    folder = foreign(tmp_path, kind, photos, key, digest="", **more)
    source = seal(folder) if sealed else [photos]
    with pytest.raises(OutsideError, match="lies outside the source .*photos, to .*, and is not"):
        image_bytes(folder, key, source)
    assert image_bytes(folder, key, [photos, tmp_path]) == (tmp_path / "secret.png").read_bytes()


def test_a_link_to_the_source_is_no_way_out(tmp_path, photos):
    (tmp_path / "other").symlink_to(photos)
    folder = foreign(tmp_path, "folder", photos, "sub/001.jpg")
    (photos / "inner.jpg").symlink_to("sub/001.jpg")
    wanted = (photos / "sub" / "001.jpg").read_bytes()
    assert image_bytes(folder, "sub/001.jpg", [tmp_path / "other"]) == wanted
    assert image_bytes(folder, "inner.jpg", [tmp_path / "other"]) == wanted


def test_own_tables_are_believed(tmp_path, photos, checkpoint, capsys):
    out = tmp_path / "out"
    assert main(words(photos, out, checkpoint)) == 0
    assert image_bytes(out, "000.png") == (photos / "000.png").read_bytes()
    capsys.readouterr()
    assert html_of(out, "000.png").count("<img") == 4
    assert capsys.readouterr().err == ""
    moved = out.rename(tmp_path / "moved")
    assert ownership.is_own(table.metadata(moved))


@pytest.mark.parametrize("change", ["path", "kind", "model", "seal", "key"])
def test_a_seal_is_of_one_description_and_one_user(change, tmp_path, photos, checkpoint, home):
    out = tmp_path / "out"
    assert main(words(photos, out, checkpoint)) == 0
    content = table.metadata(out)
    if change in ("path", "kind"):
        content["source"][change] = {"path": "/etc", "kind": "list"}[change]
    elif change == "key":
        shutil.rmtree(home)
    else:
        content[change] = {"model": "van_b0", "seal": "ä" * 64}[change]
    assert not ownership.is_own(content)


def test_the_same_command_seals_again(tmp_path, photos, checkpoint, home):
    """Also a table of an earlier version, which has no seal."""
    out = tmp_path / "out"
    assert main(words(photos, out, checkpoint)) == 0
    shutil.rmtree(home)
    with pytest.raises(ForeignError):
        image_bytes(out, "000.png")
    assert main(words(photos, out, checkpoint)) == 0
    assert image_bytes(out, "000.png") == (photos / "000.png").read_bytes()


def test_lists_lead_where_they_say(tmp_path, photos, checkpoint):
    listed = tmp_path / "lists" / "a.txt"
    listed.parent.mkdir()
    keys = ["../photos/000.png", str(photos / "003.png")]
    listed.write_text("\n".join(keys))
    out = tmp_path / "out"
    assert main(words(listed, out, checkpoint)) == 0
    assert table.load(out)[0] == keys
    for key in keys:
        assert image_bytes(out, key) == (photos / key.rpartition("/")[2]).read_bytes()
    with pytest.raises(OutsideError, match="lies outside the source"):
        image_bytes(out, "../secret.png")
    listed.write_text("\n".join([*keys, "../secret.png"]))
    for key in (*keys, "../secret.png"):  # it is not the list that was embedded
        with pytest.raises(OutsideError, match="lies outside the source"):
            image_bytes(out, key)


def test_datasets_are_not_fetched_for_others(tmp_path):
    facts = {"split": "train", "digest": ""}
    folder = foreign(tmp_path, "training", tmp_path, "x", data="hfds/some/set", **facts)
    with pytest.raises(ForeignError, match=r"where it says, hfds/some/set: pass --source"):
        image_bytes(folder, "x")
    with pytest.raises(ForeignError, match="where it says, hfds/some/set"):
        labels_of(folder, "source")
    with pytest.raises(ForeignError, match=r"are from hfds/some/set: pass this .* not digits"):
        image_bytes(folder, "x", ["digits"])


def test_missing_datasets_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = {"split": "train", "digest": ""}
    folder = foreign(tmp_path, "training", tmp_path, "x", data="medmnist/pathmnist", **facts)
    find = Thumbnails(folder, ["medmnist/pathmnist"])
    assert find("pathmnist/train[0]") is None
    assert "pathmnist.npz is missing" in find.refused


def test_the_key_is_the_users(home, tmp_path):
    content = table.metadata(foreign(tmp_path, "folder", tmp_path, "x"))
    sealed = ownership.seal(content)
    path = ownership.key_path()
    assert path == home / "vision-backbones" / "tables.key"
    assert path.stat().st_mode & 0o777 == 0o600 and len(path.read_bytes()) == 32
    assert sealed == ownership.seal(content)
    assert ownership.is_own({**content, "seal": sealed})
    path.chmod(0o666)
    assert not ownership.is_own({**content, "seal": sealed})
    path.chmod(0o600)
    path.write_bytes(b"short")
    assert ownership.seal(content) not in (None, sealed)
    assert len(path.read_bytes()) == 32  # a new key, in the place of one of another length
    assert [p.name for p in path.parent.iterdir()] == ["tables.key"]


def test_without_a_place_for_the_key(tmp_path, photos, checkpoint, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert main(words(photos, tmp_path / "out", checkpoint)) == 0
    assert table.metadata(tmp_path / "out")["seal"] is None
    assert image_bytes(tmp_path / "out", "000.png", [photos])


NAMES = [b"line\nbreak.png", b"tab\t.png", b"\xff\xfe.png", b"escape\x1b[1m.png", "sep\u2028.png"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_that_a_table_escapes(kind, tmp_path, photos, checkpoint):
    for number, name in enumerate([*NAMES, rb"back\nslash.png", b"plain.png", b"sub\n/\ta.png"]):
        path = os.path.join(os.fsencode(photos), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copy(photos / "000.png", path)
        with open(path, "ab") as file:
            file.write(b"%d" % number)
    source = photos
    if kind == "tar":
        source = tmp_path / "b\xff\t.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(photos, "")
    assert main(words(source, tmp_path / "out", checkpoint)) == 0
    keys = table.load(tmp_path / "out")[0]
    assert len(keys) == 12
    found = sorted(image_bytes(tmp_path / "out", key) for key in keys)
    assert found == sorted(path.read_bytes() for path in photos.rglob("*") if path.is_file())
