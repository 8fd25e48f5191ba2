"""Embed parts in processes of this machine: one per core, or one per GPU."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import backbones
from backbones.common.errors import MendableError
from backbones.embedding.network import Network
from backbones.embedding.worker import Event, Job, Worker

Part = tuple[int, Any]

_PROGRAM = "from backbones.embedding.worker import main; main()"
# Give up on a part after so many processes died while embedding it.
_MOST_DEATHS = 3


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_here(job: Job, network: Network, parts: Iterable[Part]) -> Iterator[Event]:
    """Embed in this process, with one thread."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damage that affects no pixel
        worker = Worker(job, network)
        try:
            torch.set_num_threads(1)
            for number, part in parts:
                yield from worker(number, part)
        finally:
            torch.set_num_threads(threads)
            worker.close()


def run_in_processes(job: Job, devices: list[str], parts: Iterable[Part]) -> Iterator[Event]:
    """Embed with one process for each of ``devices``; idle processes get the next part.

    A process that dies is replaced, and its part is embedded again.
    """
    pending = collections.deque(parts)
    events: queue.Queue[tuple[_Process, Event | int]] = queue.Queue()
    deaths: collections.Counter[int] = collections.Counter()
    running = {
        _Process(replace(job, device=device), len(devices), events)
        for device in devices[: len(pending)]
    }
    try:
        while running:
            process, event = events.get()
            if isinstance(event, int):
                running.discard(process)
                process.close()
                lost = process.part
                if lost is None and not process.ready:
                    raise MendableError(f"a process ended during start-up, with status {event}")
                if lost is None:
                    continue
                deaths[lost[0]] += 1
                if deaths[lost[0]] == _MOST_DEATHS:
                    raise MendableError(
                        f"{_MOST_DEATHS} processes ended while computing part {lost[0]}, the last "
                        f"with status {event} (-9: probably out of memory; use fewer --workers)"
                    )
                yield Event(lost[0], -process.rows, again=True)
                pending.appendleft(lost)
                running.add(_Process(process.job, len(devices), events))
                continue
            if event.error:
                raise MendableError(event.error)
            process.note(event)
            if event.part >= 0:
                yield event
            if process.part is None:
                process.give(pending.popleft() if pending else None)
    finally:
        for process in running:
            process.kill()


class _Process:
    """A worker process, and the thread that receives its events.

    Attributes:
        ready: whether it has built its network.
        part: the part it is working on, or None.
        rows: rows of that part so far.
    """

    def __init__(self, job: Job, share: int, events: queue.Queue[Any]) -> None:
        self.job, self.rows, self.ready = job, 0, False
        self.part: Part | None = None
        threads = 1 if job.device == "cpu" else max(1, cores() // share)
        path = [str(Path(backbones.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
            },
        )
        self._send(job)
        self._thread = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self._thread.start()

    def note(self, event: Event) -> None:
        """Update the state from an event of the process."""
        self.ready = True
        self.rows += event.rows
        if event.done:
            self.part = None

    def give(self, part: Part | None) -> None:
        """Send a part to the process; None ends it."""
        self.part, self.rows = part, 0
        if part is not None:
            self._send(part)
        else:
            self.close()

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self.close()
        self._thread.join()

    def _send(self, thing: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the listening thread reports that
            pickle.dump(thing, self._process.stdin)
            self._process.stdin.flush()

    def close(self) -> None:
        """Close the input of the process, which ends it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _listen(self, events: queue.Queue[Any]) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            while True:
                try:
                    event = pickle.load(answers)
                except (EOFError, pickle.UnpicklingError, OSError):
                    break  # it has ended, possibly in the middle of an event
                events.put((self, event))
        events.put((self, self._process.wait()))
