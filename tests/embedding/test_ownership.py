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
from embedding_runs import make_photos, words
from embedding_tables import make_table

from backbones.cli.main import main
from backbones.embedding import ownership, table
from backbones.embedding.labels import labels_of
from backbones.embedding.sheet import Thumbnails
from backbones.embedding.sources import ForeignError, OutsideError, image_bytes


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


def foreign(tmp_path: Path, kind: str, root: Path, *keys: str, **more: str) -> Path:
    """A table that nobody sealed."""
    source = {"kind": kind, "path": str(root), **more}
    vectors = np.random.default_rng(0).normal(size=(len(keys), 3)).astype(np.float32)
    return make_table(tmp_path / "foreign", vectors, list(keys), source=source)


def page_of(folder: Path, *words: str | Path) -> str:
    """The page that ``search`` or another command makes of a table."""
    page = folder.parent / "a.html"
    out = ["--out", folder.parent / "a.png", "--html", page]
    assert main(list(map(str, [words[0], folder, *words[1:], *out]))) == 0
    return page.read_text()


@pytest.mark.parametrize("command", ["search --key a/0.png", "duplicates", "probe --labels folder"])
def test_a_source_from_elsewhere_is_asked_for(command, tmp_path, photos, capsys):
    keys = [f"{name}/{i}.png" for name in "ab" for i in range(3)]
    for key in keys:
        (photos / key).parent.mkdir(exist_ok=True)
        shutil.copy(photos / "000.png", photos / key)
    source = {"kind": "folder", "path": str(photos)}
    folder = make_table(tmp_path / "t", np.ones((6, 3), np.float32), keys, source=source)
    told = f"{folder} was created by another user, on another machine or by an earlier version, so "
    told += "its source, "
    with pytest.raises(OSError, match=told):
        image_bytes(folder, "a/0.png")
    assert image_bytes(folder, "a/0.png", [photos]) == (photos / "000.png").read_bytes()
    with pytest.raises(ForeignError, match=r"--source .*none does not exist"):
        image_bytes(folder, "a/0.png", [tmp_path / "none"])
    assert '<div class="square"><img' not in page_of(folder, *command.split())
    said = capsys.readouterr().err
    assert f"note: images are not shown: {told}" in said and said.count("not shown") == 1
    assert '<div class="square"><img' in page_of(folder, *command.split(), "--source", photos)
    assert "not shown" not in capsys.readouterr().err


def seal(folder: Path) -> list[Path]:
    """Make a table the user's own, which needs no ``--source``."""
    content = table.metadata(folder)
    table.write_metadata(folder, {**content, "seal": ownership.seal(content)})
    return []


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("folder", "../secret.png"),
        ("folder", "sub/../../secret.png"),
        ("folder", "{0}/secret.png"),
        ("folder", "link.png"),
        ("folder", "linked/secret.png"),
        ("list", "../secret.png"),
        ("list", "{0}/secret.png"),
        ("tar", "../a.tar/secret.png"),
        ("tar", "{0}/a.tar/secret.png"),
        ("tar", "linked/a.tar/secret.png"),
        ("parquet", "../a.parquet/0"),
        ("parquet", "linked/a.parquet/0"),
    ],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_keys_stay_below_the_source(kind, key, sealed, tmp_path, photos, capsys):
    """Even in the user's own table, where somebody may have edited the keys."""
    secret = tmp_path / "secret.png"
    (photos / "link.png").symlink_to(secret)
    (photos / "linked").symlink_to(tmp_path)
    (photos / "inner.jpg").symlink_to("sub/001.jpg")
    (tmp_path / "other").symlink_to(photos)
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(secret, secret.name)
    if kind == "parquet":
        data = pa.table({"image": [secret.read_bytes()]})
        pa.parquet.write_table(data, tmp_path / "a.parquet")
    key = key.replace("{0}", str(tmp_path))
    more = {"column": "image"} if kind == "parquet" else {}
    folder = foreign(tmp_path, kind, photos, key, "000.png", "inner.jpg", digest="", **more)
    source = seal(folder) if sealed else [photos]
    with pytest.raises(OutsideError, match="leads outside the source .*photos, to .*, and is not"):
        image_bytes(folder, key, source)
    assert image_bytes(folder, key, [photos, tmp_path]) == secret.read_bytes()
    if kind != "folder":
        return
    # A link to the source, and one within, are no way out.
    wanted = (photos / "sub" / "001.jpg").read_bytes()
    assert image_bytes(folder, "inner.jpg", [tmp_path / "other"]) == wanted
    page = page_of(
        folder, "search", "--key", "000.png", *(["--source", photos] if not sealed else [])
    )
    assert (page.count("cannot be read"), page.count("<img")) == (1, 2)
    assert capsys.readouterr().err.count("note: images are not shown: ") == 1


@pytest.mark.parametrize("change", ["path", "kind", "model", "seal", "key"])
def test_a_seal_is_of_one_description_and_one_user(change, tmp_path, photos, checkpoint, home):
    out, wanted = tmp_path / "out", (photos / "000.png").read_bytes()
    assert main(words(photos, out, checkpoint)) == 0
    moved = out.rename(tmp_path / "moved")
    assert ownership.is_own(table.metadata(moved)) and image_bytes(moved, "000.png") == wanted
    content = table.metadata(moved)
    if change in ("path", "kind"):
        content["source"][change] = {"path": "/etc", "kind": "list"}[change]
    elif change == "key":
        shutil.rmtree(home)
    else:
        content[change] = {"model": "van_b0", "seal": "ä" * 64}[change]
    assert not ownership.is_own(content)
    if change == "key":  # the same command seals again, also a table of an earlier version
        with pytest.raises(ForeignError):
            image_bytes(moved, "000.png")
        assert main(words(photos, moved, checkpoint)) == 0
        assert image_bytes(moved, "000.png") == wanted


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
    with pytest.raises(OutsideError, match="leads outside the source"):
        image_bytes(out, "../secret.png")
    listed.write_text("\n".join([*keys, "../secret.png"]))
    for key in (*keys, "../secret.png"):  # it is not the list that was embedded
        with pytest.raises(OutsideError, match="leads outside the source"):
            image_bytes(out, key)


def test_datasets_are_not_fetched_for_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = {"split": "train", "digest": ""}
    folder = foreign(tmp_path, "training", tmp_path, "x", data="hfds/some/set", **facts)
    with pytest.raises(
        ForeignError, match=r"its source, hfds/some/set, is not trusted: pass --source"
    ):
        image_bytes(folder, "x")
    with pytest.raises(ForeignError, match="its source, hfds/some/set, is not"):
        labels_of(folder, "source")
    with pytest.raises(ForeignError, match=r"are from hfds/some/set: pass this .* not digits"):
        image_bytes(folder, "x", ["digits"])
    shutil.rmtree(folder)
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
