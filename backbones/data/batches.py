"""Loaders with a stated number of batches, whose processes end with the main one."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

from backbones.common.errors import DataError

_GRACE_SECONDS = 20


class SizedBatches:
    """The first ``length`` batches of a loader, without the first ``skip``."""

    def __init__(self, loader: DataLoader[Any], length: int, skip: int = 0) -> None:
        self.loader, self.length, self.skip = loader, length, skip
        self.iterator: Iterator[Any] = iter(())

    def close(self) -> None:
        """End the loader processes now.

        After an error, its traceback and the iterator refer to each other, and the garbage
        collector takes the queues before it can tell the processes to leave.
        """
        shutdown = getattr(self.iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        number = 0
        self.iterator = iter(self.loader)
        try:
            for number, batch in zip(range(1, self.length + 1), self.iterator, strict=False):
                if number > self.skip:
                    yield batch
        except DataError as error:  # torch puts the traceback of a loader process before it
            raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise OSError(str(error).strip().rpartition("Error: ")[2]) from None  # as above
        if number < self.length:
            raise DataError(
                f"the data ended after {number} of {self.length} batches: is its stated "
                "number of images correct?"
            )


class Closable:
    """A loader whose batches ``_current`` are being iterated over, if any."""

    _current: SizedBatches | None = None

    def close(self) -> None:
        """End the loader processes."""
        if self._current is not None:
            self._current.close()


def loader_options(
    workers: int, pin_memory: bool, device: torch.device, persistent: bool = True
) -> dict[str, Any]:
    """Options of a ``DataLoader`` for batches that go to ``device``.

    Its processes are kept from epoch to epoch if they are ``persistent``.
    """
    return {
        "num_workers": workers,
        "pin_memory": pin_memory and device.type == "cuda",
        "worker_init_fn": _start_worker,
        "persistent_workers": persistent and workers > 0,
    }


def _start_worker(worker_id: int) -> None:
    """Let a worker end with the main process only.

    It ignores termination signals, since it must finish the step. If the main process is killed,
    the worker ends, too: torch only notices that with the start methods ``fork`` and ``spawn``,
    since a fork server remains the worker's parent.
    """
    main = multiprocessing.parent_process()
    if main is not None:
        threading.Thread(target=_exit_after, args=(main.sentinel,), daemon=True).start()
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _exit_soon)


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _exit_soon(number: int, frame: FrameType | None) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(_GRACE_SECONDS)
    else:
        sys.exit(0)
