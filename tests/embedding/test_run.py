"""Embeddings equal the network's, each image is embedded once, and a folder holds one table."""

from __future__ import annotations

import errno
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
from embedding_runs import same, tiny_checkpoint, words
from PIL import Image
from timm.data import create_transform

import backbones
from backbones.cli.main import main
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


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(*given: Any) -> int:
    """The status of ``embed``."""
    return main(words(*given))


def prepared(checkpoint: Path, photos: Path, keys: list[str]) -> tuple[Any, torch.Tensor]:
    """The plain model, and images as timm prepares them."""
    loaded = load_model(None, checkpoint)
    transform = create_transform(**preprocessing(loaded), is_training=False)
    return loaded.model, torch.stack([transform(open_image(photos / key)) for key in keys])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for batch in table.batches(folder) for row in batch.to_pylist()]


def test_embeddings_are_those_of_the_plain_model(photos, checkpoint, out):
    done = embed(photos, out, checkpoint=checkpoint, classes=2, rows=4, batch_size=3, workers=1)
    assert (done.rows, done.done, done.corrupt) == (10, 10, [])
    keys, vectors = table.load(out)
    assert keys == sorted(str(p.relative_to(photos)) for p in photos.rglob("*.*"))
    model, images = prepared(checkpoint, photos, keys)
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        scores = model(images).softmax(1)
    assert np.allclose(vectors, features.numpy(), rtol=1e-4, atol=1e-5)
    assert vectors.std() > 0.1
    columns = rows_of(out)
    assert [row["classes"] for row in columns] == scores.topk(2).indices.tolist()
    assert np.allclose([row["scores"] for row in columns], scores.topk(2).values, atol=1e-5)
    for row in columns:
        with Image.open(photos / row["key"]) as image:
            assert (row["width"], row["height"]) == image.size
    said = json.loads((out / "metadata.json").read_text())
    weights = {"file": "best.safetensors", "path": str(checkpoint.absolute())}
    assert said["weights"] == {**weights, "sha256": sha256_of(checkpoint)}
    assert said["preprocessing"]["input_size"] == [3, 32, 32]
    assert said["names"] == [f"class{number}" for number in range(5)]
    assert (said["model"], said["dim"], said["images"], said["shards"]) == ("shvit_s1", 32, 10, 3)
    assert said["versions"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.parametrize(
    ("features", "more"), [("stage:2", {}), ("stage:0:map", {"classes": 1, "store": "float16"})]
)
def test_features_of_a_stage(photos, checkpoint, out, features, more):
    embed(photos, out, checkpoint=checkpoint, features=features, workers=1, **more)
    keys, vectors = table.load(out)
    model, images = prepared(checkpoint, photos, keys)
    stage = model.stage_features()[int(features[6])]
    with torch.inference_mode():
        (maps,) = model.forward_intermediates(images, [stage], intermediates_only=True)
    expected = maps if features.endswith("map") else maps.mean((2, 3))
    assert table.metadata(out)["shape"] == list(expected.shape[1:])
    tolerance = {"rtol": 1e-3, "atol": 1e-2} if more else {"rtol": 1e-4, "atol": 1e-4}
    assert np.allclose(vectors, expected.flatten(1).numpy(), **tolerance)
    is_half = np.array_equal(vectors, vectors.astype(np.float16).astype(np.float32))
    assert is_half is bool(more)


def test_non_finite_features_are_corrupt(photos, checkpoint, tmp_path, monkeypatch):
    plain = Network.__call__

    def overflowing(self: Network, images: Any) -> Any:
        found, *answers = plain(self, images)
        return found * torch.tensor([1, 1e6] + [1] * 8)[:, None], *answers

    options: dict[str, Any] = {"checkpoint": checkpoint, "store": "float16", "batch_size": 10}
    embed(photos, tmp_path / "whole", classes=5, **options)
    monkeypatch.setattr(Network, "__call__", overflowing)
    done = embed(photos, tmp_path / "out", classes=5, **options)
    assert done.rows == 9
    ((key, reason),) = done.corrupt
    assert key == "003.png"
    assert reason.endswith(", beyond float16's range")
    rows, whole = (rows_of(tmp_path / name) for name in ("out", "whole"))
    assert rows == [row for row in whole if row["key"] != key]


def test_the_dtype_of_the_computation(checkpoint):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in ("float32", "bfloat16"):
        network = Network(None, checkpoint, "head", 0)
        network.prepare(dtype, torch.device("cpu"), 2)
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
    assert run(photos, out, checkpoint) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"10 embeddings in {out}")
    assert "5 images are corrupt" in said.err
    assert len(table.load(out)[0]) == 10
    noted = dict(line.split("\t") for line in (out / "corrupt.txt").read_text().splitlines())
    assert {name: reason.partition(":")[0] for name, reason in noted.items()} == {
        "cut.jpg": "OSError",
        "huge.png": "DecompressionBombError",
        "link.png": "OSError",
        "none.jpg": "UnidentifiedImageError",
        "pipe.png": "OSError",
    }
    assert noted["pipe.png"] == "OSError: it is a named pipe"


@pytest.mark.parametrize("kind", ["folder", "archives"])
def test_what_comes_back_is_embedded(kind, photos, checkpoint, out, tmp_path, monkeypatch):
    """Files deleted, or unreadable, during a run are embedded by the next call."""
    source, lost, told = photos, photos / "000.png", "000.png\tOSError"
    if kind == "archives":
        source = tmp_path / "shards"
        source.mkdir()
        for name in ("a", "b"):
            shutil.make_archive(str(source / name), "tar", photos)
        lost, told = source / "b.tar", "b.tar\tDataError"
    assert run(source, tmp_path / "undisturbed", checkpoint) == 0
    listed = run_module.open_source

    def then_delete(*arguments: Any) -> Any:
        found = listed(*arguments)
        lost.rename(tmp_path / "lost")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_source", then_delete)
        assert run(source, out, checkpoint) == 1
    assert (out / "corrupt.txt").read_text() == f"{told}: it does not exist\n"
    (tmp_path / "lost").rename(lost)
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    assert run(source, out, checkpoint) == 0
    assert same(out, tmp_path / "undisturbed")
    changed = [p.name for p, time in kept.items() if p.stat().st_mtime_ns != time]
    assert kind == "archives" or changed == ["part-00000.parquet"]


@pytest.mark.parametrize("kind", ["folder", "archives"])
def test_skipped_files_are_named(kind, photos, checkpoint, out, capsys):
    (photos / "notes.txt").touch()
    source, told = photos, "1 file without the ending of a known image format: notes.txt"
    if kind == "archives":
        source = photos.parent / "shards"
        source.mkdir()
        (source / "index.json").touch()
        for name in ("a", "b"):
            shutil.make_archive(str(source / name), "tar", photos)
        told = "3 files without the ending of a known image format: index.json, "
    assert run(source, out, checkpoint) == 0
    assert f"skipped {told}" in capsys.readouterr().err


def test_corrupt_txt_is_no_way_to_other_files(photos, checkpoint, tmp_path, capsys):
    """A table from elsewhere may hold links."""
    out = tmp_path / "out"
    assert run(photos, out, checkpoint) == 0
    for name in ("weights.pth", "notes.txt", "list.txt"):
        (tmp_path / name).write_text("of the user\n")
        (out / "corrupt.txt").unlink()
        (out / "corrupt.txt").symlink_to(tmp_path / name)
        assert run(photos, out, checkpoint) == 2
        assert f"--out: {out / 'corrupt.txt'} " in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "of the user\n"


@pytest.mark.parametrize("decoders", [0, 3])
def test_decoding_beside_the_network_changes_nothing(photos, checkpoint, tmp_path, decoders):
    (photos / "none.jpg").write_text("no image")
    outs = tmp_path / "a", tmp_path / "b"
    for out, threads in zip(outs, (1, decoders), strict=True):
        assert run(photos, out, checkpoint, f"--decoders={threads}") == 1
    assert same(*outs)


def test_the_same_call_resumes(photos, checkpoint, tmp_path, monkeypatch):
    """Existing shards are kept; a damaged one is computed again."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    for name in ("000.png", "sub/001.jpg"):
        (photos / name).write_text("no image")
    for folder in (out, undisturbed):
        assert run(photos, folder, checkpoint) == 1
    lost, kept, damaged = (table.shard_path(out, number) for number in range(3))
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (out / "shards" / ".part-00001.parquet.0123.tmp").write_text("of a process that was killed")
    (out / "corrupt.txt").write_text("half a li")
    written = kept.stat().st_mtime_ns
    done = embed(photos, out, checkpoint=checkpoint, rows=4, batch_size=3, workers=1)
    assert (done.rows, done.done) == (8, 5)
    assert kept.stat().st_mtime_ns == written
    assert same(out, undisturbed)
    assert sorted(p.name for p in out.iterdir()) == ["corrupt.txt", "metadata.json", "shards"]
    assert len(list((out / "shards").iterdir())) == 3
    listed = [(folder / "corrupt.txt").read_text() for folder in (out, undisturbed)]
    assert listed[0] == listed[1] and listed[0].startswith("000.png\t")


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
    assert run(photos, out, checkpoint) == 0
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
    assert run(photos, out, checkpoint, *more) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(f"{out} was started with other settings: .*{told}", said), said
    assert {p: p.read_bytes() for p in out.rglob("*.*")} == before


def test_what_no_network_here_computes(photos, checkpoint, out, monkeypatch, capsys):
    monkeypatch.setattr("backbones.common.dtypes.policy.multiplies", lambda dtype: False)
    assert run(photos, out, checkpoint, "--dtype=bfloat16") == 2
    assert "this CPU has no bfloat16 instructions" in capsys.readouterr().err
    hat = backbones.create_model("hat_nano_x2").state_dict()
    save_weights(checkpoint.parent / "hat.safetensors", hat, {"model": "hat_nano_x2"})
    with pytest.raises(CommandError, match="restores images and has no features"):
        embed(photos, out, checkpoint=checkpoint.parent / "hat.safetensors")


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_dtypes_of_the_computation_do_not_mix(photos, checkpoint, out, dtype, monkeypatch):
    assert run(photos, out, checkpoint) == 0
    table.shard_path(out, 1).unlink()
    monkeypatch.setattr(run_module, "check_dtype", lambda dtype, device: dtype)
    with pytest.raises(table.TableError, match=f"computed: 'float32' there, '{dtype}' now"):
        embed(photos, out, checkpoint=checkpoint, rows=4, dtype=dtype)
    assert not table.shard_path(out, 1).exists()


# A process that computes, and dies once as it writes part 1.
_DIES_ONCE = """
import os, pathlib
from backbones.embedding.worker import main
plain, mark = os.replace, pathlib.Path('died')
def die_once(temporary, path):
    if path.name == 'part-00001.parquet' and not mark.exists():
        mark.touch(); os.kill(os.getpid(), 9)
    plain(temporary, path)
os.replace = die_once
main()
"""


@pytest.mark.slow
def test_processes_that_die_are_replaced(photos, checkpoint, out, tmp_path, monkeypatch):
    """The system kills a process that uses too much memory; the next attempt may succeed."""
    (photos / "sub" / "000.jpg").write_text("no image")  # in the part whose process dies
    assert run(photos, tmp_path / "here", checkpoint) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "_PROGRAM", _DIES_ONCE)
    done = embed(photos, out, checkpoint=checkpoint, rows=4, batch_size=3, workers=2)
    assert (done.rows, done.done) == (10, 10)
    assert [key for key, _ in done.corrupt] == ["sub/000.jpg"]
    assert (tmp_path / "died").exists()
    assert same(out, tmp_path / "here")


def test_an_untrained_model_and_a_folder_in_use(photos, checkpoint, out, capsys):
    with pytest.raises(CommandError, match="give --checkpoint FILE"):
        embed(photos, out, "shvit_s1")
    assert run(photos, out, checkpoint) == 0
    lock = FolderLock(out)
    try:
        assert run(photos, out, checkpoint) == 2
    finally:
        lock.release()
    assert f"{out} is in use by process {os.getpid()}" in capsys.readouterr().err


def test_ray_or_its_cluster_is_missing(photos, checkpoint, out, monkeypatch, capsys):
    assert run(photos, out, checkpoint, "--engine=ray", "--address=127.0.0.1:1") == 2
    assert "there is no Ray cluster to join" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(photos, out, checkpoint, "--engine=ray") == 2
    assert "pip install ray" in capsys.readouterr().err


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


def test_a_network_disk_that_drops_out(photos, checkpoint, out, monkeypatch, capsys):
    error = OSError(errno.ENOTCONN, "it is gone")
    monkeypatch.setattr(worker.Worker, "decode", lambda *_: (_ for _ in ()).throw(error))
    assert run(photos, out, checkpoint) == 2
    assert "it is gone" in capsys.readouterr().err and not list((out / "shards").iterdir())
