"""Embed a source of images into a folder, resuming a partial run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from backbones.common.arguments import usable_device
from backbones.common.checkpoint_files import sha256_of
from backbones.common.dtypes import check_dtype
from backbones.common.errors import CommandError
from backbones.common.files import write_text_atomically
from backbones.common.images import Skipped, installed_decoder
from backbones.common.lock import FolderLock, LockedError
from backbones.common.messages import one_line, shown
from backbones.common.outputs import Kind, require_writable
from backbones.common.progress import Progress, duration
from backbones.embedding import table
from backbones.embedding.cluster import require_ray, run_on_cluster
from backbones.embedding.local import run_here, run_in_processes
from backbones.embedding.network import Network
from backbones.embedding.ownership import is_own, seal
from backbones.embedding.sources import Reader, Source, open_source, reader
from backbones.embedding.worker import Event, Job
from ops.cpu.build.libraries import cores

ENGINES = ("local", "ray")
_PACKAGES = ("vision-backbones", "torch", "torchvision", "timm", "pillow", "numpy", "pyarrow")
_CORRUPT = Kind((".txt",), rb"[^\t\n]+(\t|\Z)")  # lines of key, tab, reason
_BATCH, _GPU_BATCH = 16, 256


@dataclass
class Summary:
    """The state of the folder after a call that took some ``seconds``."""

    rows: int  # of all shards
    corrupt: list[tuple[str, str]]  # keys and reasons of the images that could not be embedded
    done: int  # rows added by this call
    seconds: float
    skipped: Skipped  # files in folders, and members of the archives that this call read


def embed(
    source: str | Path,
    out: str | Path,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    *,
    features: str = "head",
    classes: int = 0,
    dtype: str = "float32",
    store: str = "float32",
    split: str = "train",
    column: str | None = None,
    rows: int = 1024,
    batch_size: int | None = None,
    workers: int | None = None,
    decoders: int | None = None,
    device: str = "cpu",
    engine: str = "local",
    address: str | None = None,
    progress: TextIO | None = None,
) -> Summary:
    """Embed all images of ``source`` into the folder ``out``; the same call resumes a partial run.

    :mod:`backbones.embedding.table` defines the format. However a call ends, finished shards are
    kept and the next call computes the rest, with the embeddings of an uninterrupted run.

    Args:
        source, split, column, rows: see :func:`backbones.embedding.sources.open_source`.
        out: created if missing; its parent must exist.
        model: name; optional for checkpoints of ``train_cls.py``.
        features: see :class:`backbones.embedding.network.Network`.
        classes: how many of the most likely classes to store as well.
        dtype: of the computation: ``"float32"``, ``"bfloat16"``, on a CPU ``"int8"`` or ``"auto"``
            (float32 or bfloat16, whichever this CPU is faster in), on a GPU ``"float16"``.
        store: dtype of the stored embeddings: ``"float32"`` or ``"float16"``.
        batch_size: images per batch; None: 16, on a GPU 256.
        workers: processes; None: one per core, or one per GPU.
        decoders: decoding threads per process; None: 1, or on GPUs the cores divided by the
            processes.
        device: ``"cpu"``, ``"cuda"`` (all GPUs), ``"cuda:1"``.
        engine: ``"local"``, or ``"ray"``.
        address: of the Ray cluster; None starts one on this machine.
        progress: stream for the progress bar; None shows none.

    An error says what to change: a MendableError, or an OSError for missing files.
    """
    begun = time.monotonic()
    table.require_pyarrow()
    if engine not in ENGINES:
        raise CommandError(f"--engine must be {' or '.join(ENGINES)}, not {shown(engine)}")
    if engine == "ray":
        require_ray()
    if checkpoint is None:
        raise CommandError("give --checkpoint FILE: an untrained network's features mean nothing")
    target = usable_device(device)
    dtype = check_dtype(dtype, target)
    out, checkpoint = Path(out), Path(checkpoint)
    place = Path(os.path.realpath(out))
    if os.path.isdir(source) and place.is_relative_to(os.path.realpath(source)):
        raise CommandError(f"--out {out} is inside the source {source}; choose another folder")
    if decoders is None:
        processes = 1 if target.type == "cpu" else workers or torch.cuda.device_count()
        decoders = 1 if target.type == "cpu" else max(1, cores() // processes)
    images = open_source(source, rows, split, column)
    network = Network(model, checkpoint, features, classes)
    content: dict[str, Any] = {
        "model": network.name,
        "weights": {
            "file": checkpoint.name,
            "path": str(checkpoint.absolute()),
            "sha256": sha256_of(checkpoint),
        },
        "preprocessing": network.preprocessing,
        "features": features,
        "shape": list(network.shape),
        "dim": math.prod(network.shape),
        "dtype": store,
        "computed": dtype,
        "classes": network.classes,
        "names": network.names if network.classes else [],
        "source": images.description,
        "images": images.images,
        "shards": len(images.parts),
        "rows": rows,
        "decoder": installed_decoder(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    with _locked(out):
        require_writable({"--out:": (out / table.CORRUPT, _CORRUPT)}, [source, checkpoint])
        content = _begin(out, content)
        work = _Work(out, content, images, progress)
        job = Job(
            out.absolute(),
            content,
            checkpoint.absolute(),
            device,
            batch_size or (_BATCH if target.type == "cpu" else _GPU_BATCH),
            decoders,
        )
        work.show_begin(network.name, content["dim"])
        if work.pending:
            work.follow(_events(job, network, work.pending, engine, address, workers))
        corrupt = work.write_corrupt()
    done, seconds = work.rows - work.before, time.monotonic() - begun
    return Summary(work.rows, corrupt, done, seconds, images.skipped)


def _events(
    job: Job,
    network: Network,
    pending: list[tuple[int, Any]],
    engine: str,
    address: str | None,
    workers: int | None,
) -> Generator[Event, None, None]:
    if engine == "ray":
        return run_on_cluster(job, address, pending)
    if job.device == "cpu":
        devices = ["cpu"] * (workers or cores())
    elif job.device == "cuda":
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())][:workers]
    else:
        devices = [job.device]
    devices = devices[: len(pending)]
    if len(devices) == 1 and job.device == "cpu":
        return run_here(job, network, pending)
    return run_in_processes(job, devices, pending)


# -- the folder ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Create and lock ``out``."""
    is_new = not out.exists()
    try:
        (out / table.SHARDS).mkdir(parents=True, exist_ok=True)
        lock = FolderLock(out)
    except LockedError as error:
        raise CommandError(f"{out} is in use by {error}: wait for it, or choose another") from None
    except (FileExistsError, NotADirectoryError):
        raise CommandError(f"--out {out} is not a folder: it, or a parent, is a file") from None
    except OSError as error:
        raise CommandError(f"cannot use the folder {out}: {error.strerror}") from error
    try:
        yield
    finally:
        for left in (out / table.SHARDS).glob(".*.tmp"):  # from killed processes
            left.unlink(missing_ok=True)
        lock.release()
        if is_new and not (out / table.METADATA).exists():
            with contextlib.suppress(OSError):
                (out / table.SHARDS).rmdir()
                out.rmdir()


def _begin(out: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write ``metadata.json``, or compare ``content`` with the existing file; return the file's."""
    content = json.loads(json.dumps(content))
    if not (out / table.METADATA).exists():
        foreign = [p.name for p in out.iterdir() if p.name[0] != "." and p.name != table.SHARDS]
        foreign += [f"{table.SHARDS}/{p.name}" for p in (out / table.SHARDS).glob("[!.]*")]
        if foreign:
            raise table.TableError(
                f"{out} contains other files ({one_line(foreign[0])}): choose a new folder"
            )
        table.write_metadata(out, {**content, "seal": seal(content)})
        return table.metadata(out)
    there = table.metadata(out)
    if different := table.differences(there, content):
        raise table.TableError(
            f"{out} was started with other settings: {'; '.join(different)}; choose another --out"
        )
    if not is_own(there):  # the source is the one that the user has just named
        there |= {"source": content["source"]}
        there |= {"seal": seal(there)}
        table.write_metadata(out, there)
    return there


class _Work:
    """Which parts are done, shown as they are embedded."""

    def __init__(
        self, out: Path, content: dict[str, Any], images: Source, stream: TextIO | None
    ) -> None:
        self.out, self.images = out, images
        self._latest: dict[int, Event] = {}  # of each part
        self._progress = Progress(stream is not None, stream)
        self._progress.begin("check", len(images.parts))
        opener = reader(content["source"])
        for number in range(len(images.parts)):
            self._check(number, content, opener)
            self._progress.step("shards")
        self._progress.end()
        # Parts without a shard, with their numbers; and the rows written by earlier calls.
        self.pending = [(i, part) for i, part in enumerate(images.parts) if i not in self._latest]
        self.before, self._seen_before = self.rows, self.rows + len(self.write_corrupt())
        self._begun = time.monotonic()

    @property
    def rows(self) -> int:
        """The rows written so far."""
        return sum(event.rows for event in self._latest.values())

    def _check(self, number: int, content: dict[str, Any], opener: Reader) -> None:
        """Count a shard, unless it is missing, damaged, or lacks images that can be opened now."""
        path = table.shard_path(self.out, number)
        if not path.exists():
            return
        try:
            rows, corrupt = table.corrupt_in(path, content)
        except table.DamagedShardError as error:
            self._progress.say(f"{path} is damaged ({error.reason}); embedding it again")
            path.unlink()
            return
        if not any(opener.is_back(key, reason) for key, reason in corrupt):
            self._latest[number] = Event(number, rows, tuple(corrupt), done=True)

    def write_corrupt(self) -> list[tuple[str, str]]:
        """Write ``corrupt.txt``; returns its lines, in the order of the source."""
        corrupt = [entry for _, event in sorted(self._latest.items()) for entry in event.corrupt]
        lines = (f"{key}\t{reason}\n" for key, reason in corrupt)
        write_text_atomically(self.out / table.CORRUPT, "".join(lines))
        return corrupt

    def follow(self, events: Generator[Event, None, None]) -> None:
        """Consume the engine's events until all parts are done."""
        try:
            for event in events:
                self._latest[event.part] = event
                if event.skipped:
                    self.images.skipped.add(event.skipped.names, event.skipped.count)
                if self._progress.due():
                    self._show()
        finally:
            events.close()  # ends the processes
            self._progress.end()

    def show_begin(self, model: str, dim: int) -> None:
        """Show what is about to be computed."""
        total, parts = self.images.images, len(self.images.parts)
        count = f"{parts} archives" if total is None else f"{total} images"
        done = f", {self._seen_before} images done before" if self._seen_before else ""
        self._progress.say(f"{model}: {count} into {self.out}, {dim} numbers each{done}")
        self._first = len(self._latest) if total is None else self._seen_before
        self._progress.begin("embed", total or parts, self._first)

    def _show(self) -> None:
        corrupt = sum(len(event.corrupt) for event in self._latest.values())
        seen, done = self.rows + corrupt, sum(event.done for event in self._latest.values())
        self._progress.done = done if self.images.images is None else seen
        rate = (seen - self._seen_before) / max(time.monotonic() - self._begun, 1e-9)
        parts = [f"{rate:.0f} images/s"]
        if self._progress.done > self._first:
            parts.append(f"{duration(self._progress.seconds_left())} left")
        if corrupt:
            parts.append(f"{corrupt} corrupt")
        self._progress.show(self._progress.done, "  ".join(parts))
