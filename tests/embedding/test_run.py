"""Embeddings equal the network's, each image is embedded once, and a folder holds one table."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedding_runs import make_photos, same, tiny_checkpoint, words
from PIL import Image
from timm.data import create_transform

import backbones
from backbones.cli.main import main
from backbones.common import images
from backbones.common.checkpoint_files import sha256_of
from backbones.common.errors import CommandError
from backbones.common.files import save_weights
from backbones.common.images import open_image
from backbones.common.lock import FolderLock
from backbones.core.loaded import load as load_model
from backbones.core.loaded import preprocessing
from backbones.embedding import embed, local, table, worker
from backbones.embedding import run as run_module
from backbones.embedding.network import Network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 10)


def run(*argv: str) -> int:
    return main(list(argv))


def test_embeddings_are_those_of_the_plain_model(photos, checkpoint):
    out = photos.parent / "out"
    done = embed(photos, out, checkpoint=checkpoint, classes=2, rows=4, batch_size=3, workers=1)
    assert (done.rows, done.done, done.corrupt) == (10, 10, [])
    loaded = load_model(None, checkpoint)
    transform = create_transform(**preprocessing(loaded), is_training=False)
    keys, vectors = table.load(out)
    assert keys == sorted(str(p.relative_to(photos)) for p in photos.rglob("*.*"))
    images = torch.stack([transform(open_image(photos / key)) for key in keys])
    with torch.inference_mode():
        features = loaded.model.forward_head(loaded.model.forward_features(images), pre_logits=True)
        scores = loaded.model(images).softmax(1)
    assert np.allclose(vectors, features.numpy(), rtol=1e-4, atol=1e-5)
    assert vectors.std() > 0.1
    columns = [row for batch in table.batches(out) for row in batch.to_pylist()]
    assert [row["classes"] for row in columns] == scores.topk(2).indices.tolist()
    assert np.allclose([row["scores"] for row in columns], scores.topk(2).values, atol=1e-5)
    for row in columns:
        with Image.open(photos / row["key"]) as image:
            assert (row["width"], row["height"]) == image.size


@pytest.mark.parametrize("features", ["stage:2", "stage:0:map"])
@pytest.mark.parametrize("classes", [0, 1])
def test_features_of_a_stage(photos, checkpoint, features, classes):
    out = photos.parent / "out"
    embed(photos, out, checkpoint=checkpoint, features=features, classes=classes, workers=1)
    loaded = load_model(None, checkpoint)
    transform = create_transform(**preprocessing(loaded), is_training=False)
    keys, vectors = table.load(out)
    images = torch.stack([transform(open_image(photos / key)) for key in keys])
    stage = loaded.model.stage_features()[int(features[6])]
    with torch.inference_mode():
        (maps,) = loaded.model.forward_intermediates(images, [stage], intermediates_only=True)
    expected = maps if features.endswith("map") else maps.mean((2, 3))
    assert table.metadata(out)["shape"] == list(expected.shape[1:])
    assert np.allclose(vectors, expected.flatten(1).numpy(), rtol=1e-4, atol=1e-4)


def test_half_of_the_bytes(photos, checkpoint, tmp_path):
    for store in ("float32", "float16"):
        embed(photos, tmp_path / store, checkpoint=checkpoint, store=store, workers=1)
    exact, half = (table.load(tmp_path / store)[1] for store in ("float32", "float16"))
    assert np.array_equal(half, exact.astype(np.float16).astype(np.float32))


def test_non_finite_features_are_corrupt(photos, checkpoint, tmp_path, monkeypatch):
    plain = Network.__call__

    def overflowing(self: Network, images: Any) -> Any:
        found, *answers = plain(self, images)
        return found * torch.tensor([1, 1e6] + [1] * 8)[:, None], *answers

    options: dict[str, Any] = {"checkpoint": checkpoint, "store": "float16", "batch_size": 10}
    embed(photos, tmp_path / "whole", classes=2, **options)
    monkeypatch.setattr(Network, "__call__", overflowing)
    done = embed(photos, tmp_path / "out", classes=2, **options)
    assert done.rows == 9
    ((key, reason),) = done.corrupt
    assert key == "003.png"
    assert reason.endswith(", beyond float16's range")
    rows, whole = (
        [row for batch in table.batches(tmp_path / name) for row in batch.to_pylist()]
        for name in ("out", "whole")
    )
    assert rows == [row for row in whole if row["key"] != key]


def test_the_dtype_of_the_computation(checkpoint):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in ("float32", "bfloat16"):
        network = Network(None, checkpoint, "head", 0)
        network.prepare(dtype, torch.device("cpu"))
        found[dtype], _, _ = network(images)
    exact, rounded = found.values()
    assert exact.dtype == rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.05


def test_unreadable_images(photos, checkpoint, capsys):
    """Opening a named pipe would block; an image of a huge declared size would exhaust memory."""
    out = photos.parent / "out"
    (photos / "cut.jpg").write_bytes((photos / "sub" / "001.jpg").read_bytes()[:300])
    (photos / "none.jpg").write_text("no image")
    os.mkfifo(photos / "pipe.png")
    (photos / "link.png").symlink_to("nowhere")
    header = bytearray((photos / "000.png").read_bytes())
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (photos / "huge.png").write_bytes(bytes(header))
    Image.new("RGB", (1, 200_000)).save(photos / "narrow.png")
    assert run(*words(photos, out, checkpoint)) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"10 embeddings in {out}")
    assert "6 images are corrupt" in said.err
    assert len(table.load(out)[0]) == 10
    noted = dict(line.split("\t") for line in (out / "corrupt.txt").read_text().splitlines())
    assert {name: reason.partition(":")[0] for name, reason in noted.items()} == {
        "cut.jpg": "OSError",
        "huge.png": "DecompressionBombError",
        "link.png": "OSError",
        "narrow.png": "ValueError",
        "none.jpg": "UnidentifiedImageError",
        "pipe.png": "OSError",
    }
    assert noted["pipe.png"] == "OSError: it is a named pipe"
    before = (out / "corrupt.txt").read_bytes()
    assert run(*words(photos, out, checkpoint)) == 1
    assert (out / "corrupt.txt").read_bytes() == before


def test_metadata_of_other_versions(photos, checkpoint, tmp_path, capsys):
    """What an older version did not write is not needed, or named; other formats are refused."""
    out = tmp_path / "out"
    assert run(*words(photos, out, checkpoint)) == 0
    before = json.loads((out / "metadata.json").read_text())

    def resumed(**changes: Any) -> tuple[int, str]:
        content = {k: v for k, v in {**before, **changes}.items() if v is not None}
        if "images" not in changes:
            content["images"] = before["images"]
        (out / "metadata.json").write_text(json.dumps(content))
        table.shard_path(out, 2).unlink(missing_ok=True)
        capsys.readouterr()
        status = run(*words(photos, out, checkpoint))
        return status, capsys.readouterr().err.splitlines()[-1]

    optional = ("decoder", "names", "versions", "seal")
    assert resumed(**dict.fromkeys(optional))[0] == 0
    status, told = resumed(rows=None)
    assert status == 2 and told.startswith("error: ") and told.endswith("lacks rows")


def test_images_that_come_back(photos, checkpoint, tmp_path, monkeypatch):
    """Images deleted, or unreadable, during a run are embedded by the next call."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    assert run(*words(photos, undisturbed, checkpoint)) == 0
    (photos / "none.jpg").write_text("no image")
    listed = run_module.open_source

    def then_delete(*arguments: Any) -> Any:
        source = listed(*arguments)
        shutil.move(photos / "000.png", tmp_path / "000.png")
        return source

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_source", then_delete)
        assert run(*words(photos, out, checkpoint)) == 1
    assert "000.png\tOSError: it does not exist\n" in (out / "corrupt.txt").read_text()
    shutil.move(tmp_path / "000.png", photos / "000.png")
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    assert run(*words(photos, out, checkpoint)) == 1
    assert len((out / "corrupt.txt").read_text().splitlines()) == 1  # none.jpg
    assert same(out, undisturbed)
    changed = [p.name for p, time in kept.items() if p.stat().st_mtime_ns != time]
    assert changed == ["part-00000.parquet"]


def test_archives_that_come_back(photos, checkpoint, tmp_path, monkeypatch):
    shards, out = tmp_path / "shards", tmp_path / "out"
    shards.mkdir()
    for name in ("a", "b"):
        shutil.make_archive(str(shards / name), "tar", photos)
    listed = run_module.open_source

    def then_delete(*arguments: Any) -> Any:
        source = listed(*arguments)
        (shards / "b.tar").rename(tmp_path / "b.tar")
        return source

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_source", then_delete)
        assert run(*words(shards, out, checkpoint)) == 1
    assert (out / "corrupt.txt").read_text() == "b.tar\tDataError: it does not exist\n"
    (tmp_path / "b.tar").rename(shards / "b.tar")
    assert run(*words(shards, out, checkpoint)) == 0
    assert len(table.load(out)[0]) == 20


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_skipped_files_are_named(photos, checkpoint, capsys, workers):
    (photos / "notes.txt").touch()
    shards = photos.parent / "shards"
    shards.mkdir()
    (shards / "index.json").touch()
    for name in ("a", "b"):
        shutil.make_archive(str(shards / name), "tar", photos)
    for place, told in (
        (photos, "skipped 1 file without the ending of a known image format: notes.txt"),
        (shards, "skipped 3 files without the ending of a known image format: index.json, "),
    ):
        argv = words(place, photos.parent / f"{place.name}-out", checkpoint)
        assert run(*argv, f"--workers={workers}") == 0
        assert told in capsys.readouterr().err


def test_corrupt_txt_is_no_way_to_other_files(photos, checkpoint, tmp_path, capsys):
    """A table from elsewhere may hold links."""
    out = tmp_path / "out"
    assert run(*words(photos, out, checkpoint)) == 0
    for name in ("weights.pth", "notes.txt", "list.txt"):
        (tmp_path / name).write_text("of the user\n")
        (out / "corrupt.txt").unlink()
        (out / "corrupt.txt").symlink_to(tmp_path / name)
        assert run(*words(photos, out, checkpoint)) == 2
        assert f"--out: {out / 'corrupt.txt'} " in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "of the user\n"


@pytest.mark.parametrize("decoders", [0, 3])
def test_decoding_beside_the_network_changes_nothing(photos, checkpoint, tmp_path, decoders):
    (photos / "none.jpg").write_text("no image")
    outs = tmp_path / "a", tmp_path / "b"
    for out, threads in zip(outs, (1, decoders), strict=True):
        assert run(*words(photos, out, checkpoint, f"--decoders={threads}")) == 1
    assert same(*outs)


def test_the_same_call_resumes(photos, checkpoint, tmp_path, monkeypatch):
    """Existing shards are kept; a damaged one is computed again."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    for folder in (out, undisturbed):
        assert run(*words(photos, folder, checkpoint)) == 0
    kept, lost, damaged = (table.shard_path(out, number) for number in range(3))
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (out / "shards" / ".part-00001.parquet.0123.tmp").write_text("of a process that was killed")
    (out / "corrupt.txt").write_text("half a li")
    written = kept.stat().st_mtime_ns
    done = embed(photos, out, checkpoint=checkpoint, rows=4, batch_size=3, workers=1)
    assert (done.rows, done.done) == (10, 6)
    assert kept.stat().st_mtime_ns == written
    assert same(out, undisturbed)
    assert sorted(p.name for p in out.iterdir()) == ["corrupt.txt", "metadata.json", "shards"]
    assert len(list((out / "shards").iterdir())) == 3
    assert (out / "corrupt.txt").read_text() == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--features=stage:1"], "features: 'head' there, 'stage:1' now"),
        (["--store=float16"], "dtype: 'float32' there, 'float16' now"),
        (["--rows=5"], "rows: 4 there, 5 now"),
        (["--classes=1"], "classes: 0 there, 1 now"),
        ("seed", r"weights: sha256 '[\w.]+' there, '[\w.]+' now"),
        ("crop_pct", "preprocessing: crop_pct 0.875 there, 0.5 now"),
        ("images", "the images listed in .*photos have changed .10 there, 11 now"),
        ("source", "source: path '.*photos' there, '.*other' now"),
    ],
)
def test_a_folder_of_other_settings(photos, checkpoint, capsys, change, told):
    out, more = photos.parent / "out", []
    assert run(*words(photos, out, checkpoint)) == 0
    before = {p: p.read_bytes() for p in out.rglob("*.*")}
    if change == "seed":
        checkpoint = tiny_checkpoint(photos.parent / "model", seed=1)
    elif change == "crop_pct":
        checkpoint = tiny_checkpoint(photos.parent / "model", crop_pct=0.5)
    elif change == "images":
        shutil.copy(photos / "000.png", photos / "new.png")
    elif change == "source":
        photos = photos.rename(photos.parent / "other")
    else:
        more = list(change)
    capsys.readouterr()
    assert run(*words(photos, out, checkpoint, *more)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(f"{out} was started with other settings: .*{told}", said), said
    assert {p: p.read_bytes() for p in out.rglob("*.*")} == before


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_dtypes_of_the_computation_do_not_mix(photos, checkpoint, dtype, monkeypatch):
    out = photos.parent / "out"
    assert run(*words(photos, out, checkpoint)) == 0
    table.shard_path(out, 1).unlink()
    monkeypatch.setattr(run_module, "check_dtype", lambda dtype, device: None)
    with pytest.raises(table.TableError, match=f"computed: 'float32' there, '{dtype}' now"):
        embed(photos, out, checkpoint=checkpoint, rows=4, dtype=dtype)
    assert not table.shard_path(out, 1).exists()


def test_a_folder_is_of_one_process(photos, checkpoint, capsys):
    out = photos.parent / "out"
    assert run(*words(photos, out, checkpoint)) == 0
    capsys.readouterr()
    lock = FolderLock(out)
    try:
        assert run(*words(photos, out, checkpoint)) == 2
    finally:
        lock.release()
    assert f"{out} is in use by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_die_are_replaced(photos, checkpoint, tmp_path, monkeypatch):
    """The system kills a process that uses too much memory; the next attempt may succeed."""
    (photos / "sub" / "000.jpg").write_text("no image")  # in the part whose process dies
    assert run(*words(photos, tmp_path / "here", checkpoint)) == 1
    monkeypatch.setattr(
        local,
        "_PROGRAM",
        "import os, pathlib\n"
        "from backbones.embedding.worker import main\n"
        "plain, mark = os.replace, pathlib.Path('died')\n"
        "def die_once(temporary, path):\n"
        "    if path.name == 'part-00001.parquet' and not mark.exists():\n"
        "        mark.touch(); os.kill(os.getpid(), 9)\n"
        "    plain(temporary, path)\n"
        "os.replace = die_once\n"
        "main()",
    )
    monkeypatch.chdir(tmp_path)
    done = embed(photos, tmp_path / "out", checkpoint=checkpoint, rows=4, batch_size=3, workers=2)
    assert (done.rows, done.done) == (10, 10)
    assert [key for key, _ in done.corrupt] == ["sub/000.jpg"]
    assert (tmp_path / "died").exists()
    assert same(tmp_path / "out", tmp_path / "here")


@pytest.mark.parametrize("rows", [2, 0])
def test_a_part_that_begins_again_counts_its_corrupt_images_once(
    rows, photos, checkpoint, monkeypatch
):
    """Even if the process died before it had a row to lose."""
    (photos / "000.png").write_text("no image")
    at: list[int] = []

    def dying(job: Any, network: Network, parts: Any, *_: Any) -> Iterator[worker.Event]:
        for number, part in parts:
            first, *others = worker.Worker(job, network)(number, part)
            if number == 0:
                yield first._replace(rows=rows)
                yield worker.Event(0, -rows, again=True)
            yield from (first, *others)

    monkeypatch.setattr(run_module, "_events", dying)
    monkeypatch.setattr(run_module.Progress, "due", lambda self: True)
    monkeypatch.setattr(run_module.Progress, "show", lambda self, done, text: at.append(done))
    done = embed(photos, photos.parent / "out", checkpoint=checkpoint, rows=4, batch_size=3)
    assert (done.rows, done.done) == (9, 9)
    assert [key for key, _ in done.corrupt] == ["000.png"]
    assert (photos.parent / "out" / "corrupt.txt").read_text().count("\n") == 1
    assert at[-1] == 10


@pytest.mark.slow
def test_processes_that_keep_dying(photos, checkpoint, monkeypatch):
    monkeypatch.setattr(local, "_MOST_DEATHS", 1)
    kill = "import os, backbones.embedding.worker as w\n"
    kill += "w.Worker.__call__ = lambda self, *part: os.kill(os.getpid(), 9)\nw.main()"
    monkeypatch.setattr(local, "_PROGRAM", kill)
    with pytest.raises(
        Exception, match="processes ended while computing part 0, the last with status -9"
    ):
        embed(photos, photos.parent / "out", checkpoint=checkpoint, rows=6, workers=2)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model=shvit_s9"], "shvit_s9"),
        (["--features=head:1"], "--features must be head, stage:N or stage:N:map, not 'head:1'"),
        (["--features=stage:3"], "shvit_s1 has stages 0 … 2, no 3"),
        (["--classes=6"], "shvit_s1 has 5 classes, fewer than the requested 6"),
        (["--dtype=float16"], "--dtype float16 is for GPUs"),
        (["--device=cuda:7"], "--device cuda:7 cannot be used here"),
        (["--checkpoint=absent.pth"], "no checkpoint at absent.pth"),
        (["--engine=ray", "--address=127.0.0.1:1"], "there is no Ray cluster to join"),
    ],
)
def test_bad_arguments_are_one_line(photos, checkpoint, capsys, more, told):
    out = photos.parent / "out"
    assert run(*words(photos, out, checkpoint, *more)) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "error: " in said
    assert more[0].startswith("--engine") or not out.exists()


def test_bfloat16_is_for_cpus_that_multiply_it(photos, checkpoint, monkeypatch):
    monkeypatch.setattr("backbones.common.dtypes.policy.multiplies", lambda dtype: False)
    with pytest.raises(CommandError, match="this CPU has no bfloat16 instructions"):
        embed(photos, photos.parent / "out", checkpoint=checkpoint, dtype="bfloat16")


@pytest.mark.parametrize("package", ["pyarrow", "ray"])
def test_missing_packages(photos, checkpoint, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert run(*words(photos, photos.parent / "out", checkpoint, "--engine=ray")) == 2
    assert f"pip install {package}" in capsys.readouterr().err


def test_the_decoder_stays_the_same(photos, checkpoint, monkeypatch, capsys):
    """A table is finished with the decoder it was begun with, or not at all."""
    out, words_of = photos.parent / "out", functools.partial(words, photos)
    monkeypatch.setattr(images.features, "check_feature", lambda name: False)
    assert run(*words_of(out, checkpoint)) == 0
    assert table.metadata(out)["decoder"] == "pillow"
    table.shard_path(out, 1).unlink()
    monkeypatch.undo()
    used: list[str] = []
    plain = worker.Images.__init__

    def noting(self: worker.Images, *given: Any) -> None:
        plain(self, *given)
        used.append(self.decoder)

    monkeypatch.setattr(worker.Images, "__init__", noting)
    assert run(*words_of(out, checkpoint)) == 0
    assert run(*words_of(photos.parent / "other", checkpoint)) == 0
    assert used == ["pillow", "simplejpeg"]
    table.shard_path(photos.parent / "other", 1).unlink()
    monkeypatch.setattr(images.features, "check_feature", lambda name: False)
    capsys.readouterr()
    assert run(*words_of(photos.parent / "other", checkpoint)) == 2
    assert "started with simplejpeg, which can't be used here" in capsys.readouterr().err


def test_out_is_beside_the_source(photos, checkpoint, capsys):
    assert run(*words(photos, photos / "out", checkpoint)) == 2
    assert "is inside the source" in capsys.readouterr().err
    (photos.parent / "out").mkdir()
    (photos.parent / "out" / "notes.md").write_text("mine")
    assert run(*words(photos, photos.parent / "out", checkpoint)) == 2
    assert "contains other files (notes.md)" in capsys.readouterr().err
    assert run(*words(photos, photos.parent / "out" / "notes.md", checkpoint)) == 2
    assert "notes.md is not a folder" in capsys.readouterr().err


def test_a_vanished_source_is_not_a_corrupt_image(photos, checkpoint, monkeypatch):
    plain = worker.Worker.__call__

    def moved(self: worker.Worker, number: int, part: Any) -> Iterator[worker.Event]:
        if photos.exists():
            photos.rename(photos.parent / "moved")
        return plain(self, number, part)

    monkeypatch.setattr(worker.Worker, "__call__", moved)
    with pytest.raises(Exception, match="the source .*photos no longer exists"):
        embed(photos, photos.parent / "out", checkpoint=checkpoint, workers=1)
    assert (photos.parent / "out" / "corrupt.txt").read_text() == ""


def test_an_untrained_model_is_refused(photos):
    with pytest.raises(CommandError, match="give --checkpoint FILE"):
        embed(photos, photos.parent / "out", "shvit_s1")


def test_a_restorer_has_no_features(photos, tmp_path):
    model = backbones.create_model("hat_s_x2")
    save_weights(tmp_path / "hat.safetensors", model.state_dict(), {"model": "hat_s_x2"})
    with pytest.raises(CommandError, match="restores images and has no features"):
        embed(photos, tmp_path / "out", checkpoint=tmp_path / "hat.safetensors")


def test_metadata_explains_the_table(photos, checkpoint):
    out = photos.parent / "out"
    embed(photos, out, checkpoint=checkpoint, classes=1, workers=1)
    said = json.loads((out / "metadata.json").read_text())
    assert said["model"] == "shvit_s1"
    assert said["weights"] == {
        "file": "best.safetensors",
        "path": str(checkpoint.absolute()),
        "sha256": sha256_of(checkpoint),
    }
    assert said["preprocessing"]["input_size"] == [3, 32, 32]
    assert (said["dim"], said["images"], said["shards"]) == (32, 10, 1)
    assert said["versions"]["torch"] == importlib.metadata.version("torch")
