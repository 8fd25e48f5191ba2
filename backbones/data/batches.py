"""Batches of loaders, whose processes end with the main one."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from backbones.common.errors import DataError

_GRACE_SECONDS = 20


def first_batches(loader: DataLoader[Any], count: int, skip: int = 0) -> Iterator[Any]:
    """The first ``count`` batches of a loader, without the first ``skip``."""
    number = 0
    try:
        for number, batch in zip(range(1, count + 1), loader, strict=False):
            if number > skip:
                yield batch
    except DataError as error:  # torch puts the traceback of a loader process before it
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(str(error).strip().rpartition("Error: ")[2]) from None  # as above
    if number < count:
        raise DataError(
            f"the data ended after {number} of {count} batches: is its stated number of images "
            "correct?"
        )


class Closable:
    """An owner of a loader."""

    _loader: DataLoader[Any] | None = None

    def close(self) -> None:
        """End the loader processes now.

        After an error, its traceback and the loader's iterator refer to each other, and the garbage
        collector takes the queues before it can tell the processes to leave.
        """
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()


def loader_options(workers: int, pin_memory: bool, device: torch.device) -> dict[str, Any]:
    """Options of a ``DataLoader`` for batches that go to ``device``."""
    return {
        "num_workers": workers,
        "pin_memory": pin_memory and device.type == "cuda",
        "worker_init_fn": _start_worker,
        "persistent_workers": workers > 0,
        "generator": torch.Generator(),  # draws no random numbers of the training's
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
    if hasattr(signal, "alarm") and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
