"""Batches of loaders, whose processes end with the main one."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from backbones.common.errors import DataError
from backbones.common.processes import World

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


class LoaderOwner:
    """Opens a loader as a recipe says, and ends its processes."""

    recipe: Any  # with ``workers`` and ``pin_memory``
    world: World
    collate: Any = None  # the loader's ``collate_fn``
    _loader: Any = None

    def open(self, data: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """A loader of data that goes to the device; its processes stay from epoch to epoch."""
        usual = {
            "num_workers": self.recipe.workers,
            "pin_memory": self.recipe.pin_memory and self.world.device.type == "cuda",
            "worker_init_fn": _start_worker,
            "persistent_workers": self.recipe.workers > 0,
            "generator": torch.Generator(),  # draws no random numbers of the training's
            "collate_fn": self.collate,
        }
        return DataLoader(data, **{**usual, **options})

    def close(self) -> None:
        """End the loader processes now.

        After an error, its traceback and the loader's iterator refer to each other, and the garbage
        collector takes the queues before it can tell the processes to leave.
        """
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()


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
