"""Embeds parts of a source: in this process, in worker processes, or on a cluster.

As a program, it reads a pickled :class:`Job` and then numbered parts from standard input, and
writes pickled :class:`Event` objects to standard output. It exits at the end of its input, or when
its output is closed.
"""

from __future__ import annotations

import collections
import errno
import functools
import itertools
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from backbones.common.checkpoint_files import sha256_of
from backbones.common.errors import DataError, MendableError, memory_shortage
from backbones.common.images import (
    DECODE_ERRORS,
    Skipped,
    as_8_bits,
    installed_decoder,
    open_pixels,
)
from backbones.common.messages import first_line
from backbones.common.resizing import Resizing
from backbones.embedding import table
from backbones.embedding.network import Network
from backbones.embedding.sources import Item, reader

# Errors for unreachable network disks and for too many open files.
_OUT_OF_REACH = {
    getattr(errno, name)
    for name in ("ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "EMFILE", "ENFILE")
    if hasattr(errno, name)
}


@dataclass(frozen=True)
class Job:
    """The configuration of a worker process."""

    folder: Path
    content: dict[str, Any]  # of metadata.json
    checkpoint: Path
    device: str
    batch_size: int
    decoders: int  # threads that decode while the network runs; 0 to alternate in one thread


class Event(NamedTuple):
    """Progress of a part, since it was begun."""

    part: int
    rows: int = 0  # written so far
    corrupt: tuple[tuple[str, str], ...] = ()  # keys and reasons of undecodable images
    done: bool = False  # whether the shard is on disk
    error: str = ""  # why the part failed, if it did
    skipped: Skipped | None = None  # members of archives, once the part is done


_Decoded = tuple[str, np.ndarray, tuple[int, int]]  # key, pixels, original size


class Worker:
    """Embeds parts and writes their shards."""

    def __init__(self, job: Job, network: Network | None = None) -> None:
        said = job.content
        if network is None:
            if sha256_of(job.checkpoint) != said["weights"]["sha256"]:
                raise DataError(
                    f"{job.checkpoint} is not the file that {job.folder} was started with; all "
                    "machines must use the same file"
                )
            network = Network(said["model"], job.checkpoint, said["features"], said["classes"])
        self.job, self.network = job, network
        network.prepare(said["computed"], torch.device(job.device), job.batch_size)
        self._reader = reader(said["source"])
        self._resize, self._decoder = Resizing(said["preprocessing"]), installed_decoder()
        self._pool = ThreadPoolExecutor(job.decoders) if job.decoders else None

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, number: int, part: Any) -> Iterator[Event]:
        """Write shard ``number`` from the images of ``part``."""
        path = table.shard_path(self.job.folder, number)
        with table.writing_shard(path, self.job.content) as shard:
            decoded = self._decoded(part, shard.corrupt)
            while batch := list(itertools.islice(decoded, self.job.batch_size)):
                self._embed(batch, shard)
                yield Event(number, shard.rows, tuple(shard.corrupt))
        skipped, self._reader.skipped = self._reader.skipped, Skipped()
        yield Event(number, shard.rows, tuple(shard.corrupt), done=True, skipped=skipped)

    def _embed(self, batch: list[_Decoded], shard: table.Shard) -> None:
        pixels = [image for _, image, _ in batch]
        found, classes, scores = self.network.of_pixels(pixels, self._resize, self.job.batch_size)
        stored = found.half() if self.job.content["dtype"] == "float16" else found
        finite = stored.isfinite().all(1)
        for i in (~finite).nonzero()[:, 0].tolist():
            beyond = ", beyond float16's range" if found[i].isfinite().all() else ""
            value = found[i].abs().max().item()
            reason = f"ValueError: its embedding reaches {value:g}{beyond}"
            shard.corrupt.append((batch[i][0], reason))
        kept = [batch[i] for i in finite.nonzero()[:, 0].tolist()]
        shard.add(
            [key for key, _, _ in kept],
            [size for _, _, size in kept],
            stored[finite].numpy(),
            None if classes is None else classes[finite].numpy(),
            None if scores is None else scores[finite].numpy(),
        )

    def _decoded(self, part: Any, corrupt: list[tuple[str, str]]) -> Iterator[_Decoded]:
        """The images of a part that can be decoded, in order."""
        for item, decoding in self._ahead(self._items(part, corrupt)):
            try:
                image, size = decoding()
            except DECODE_ERRORS as error:
                self._require_source(error)
                corrupt.append((item.key, _reason(error)))
            except (MemoryError, RuntimeError) as error:
                if (shortage := memory_shortage(error)) is None:
                    raise
                corrupt.append((item.key, shortage))
            else:
                yield item.key, image, size

    def decode(self, item: Item) -> tuple[np.ndarray, tuple[int, int]]:
        """Open, decode and resize an image: (C, H, W) uint8, and its original height and width."""
        source, mode = item.open(), self._resize.mode
        if isinstance(source, Image.Image):
            pixels = np.asarray(as_8_bits(source, mode))
        else:
            with source:
                pixels = open_pixels(source, mode, self._decoder)
        return self._resize.fit(pixels), (pixels.shape[0], pixels.shape[1])

    def _ahead(
        self, items: Iterator[Item]
    ) -> Iterator[tuple[Item, Callable[[], tuple[np.ndarray, tuple[int, int]]]]]:
        """Items with functions that return the decoded images, prefetched if there are threads."""
        if self._pool is None:
            for item in items:
                yield item, functools.partial(self.decode, item)
            return
        waiting: collections.deque[tuple[Item, Callable[[], Any]]] = collections.deque()
        for item in items:
            waiting.append((item, self._pool.submit(self.decode, item).result))
            if len(waiting) > 2 * self.job.batch_size:
                yield waiting.popleft()
        yield from waiting

    def _items(self, part: Any, corrupt: list[tuple[str, str]]) -> Iterator[Item]:
        """The items of a part; those before the damage if its archive or table is damaged."""
        try:
            yield from self._reader.items(part)
        except DataError as error:
            self._require_source(error)
            name = part if isinstance(part, str) else part[0]
            corrupt.append((name, _reason(error)))

    def _require_source(self, error: Exception) -> None:
        """Raise a MendableError for an unreachable source; return for a corrupt image."""
        root = self._reader.root
        if isinstance(error, OSError) and error.errno in _OUT_OF_REACH:
            raise MendableError(f"cannot read {root}: {error.strerror}") from error
        if not root.is_dir():
            raise MendableError(f"the source {root} no longer exists") from error


def _reason(error: Exception) -> str:
    # Pillow's message contains the repr of the open file, which tells the user nothing.
    said = first_line(error).replace("cannot identify image file <_io.", "no known format: <_io.")
    return f"{type(error).__name__}: {said.partition(': <_io.')[0]}"


def main() -> None:
    """Process parts from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def say(event: Event) -> None:
        pickle.dump(event, answers)
        answers.flush()

    warnings.simplefilter("ignore")  # about damage that affects no pixel
    number = -1
    try:
        with sys.stdin.buffer as orders:
            job: Job = pickle.load(orders)
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            worker = Worker(job)
            while True:
                number, part = pickle.load(orders)
                for event in worker(number, part):
                    say(event)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent process has ended or closed the input
    except (MendableError, OSError, ValueError) as error:
        say(Event(number, error=f"{first_line(error)}"))
        os._exit(2)
