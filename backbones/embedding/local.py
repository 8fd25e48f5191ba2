"""Parts embedded by processes of this machine: one a core, or one a GPU."""

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
from backbones.core.console import MendableError
from backbones.embedding.network import Network
from backbones.embedding.worker import Event, Job, Worker

__all__ = ["cores", "run_here", "run_in_processes"]

Part = tuple[int, Any]

_PROGRAM = "from backbones.embedding.worker import main; main()"
# A part that so many processes died of is given up.
_MOST_DEATHS = 3


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_here(job: Job, network: Network, parts: Iterable[Part]) -> Iterator[Event]:
    """Embed in this process, with one thread.

    Raises:
        MendableError, OSError: see :class:`backbones.embedding.worker.Worker`.
    """
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage that spoils no pixel
        worker = Worker(job, network)
        try:
            torch.set_num_threads(1)
            for number, part in parts:
                yield from worker(number, part)
        finally:
            torch.set_num_threads(threads)
            worker.close()


def run_in_processes(job: Job, devices: list[str], parts: Iterable[Part]) -> Iterator[Event]:
    """Embed in a process for each of ``devices``; whoever is idle gets the next part.

    A process that dies is replaced, and another one does its part.

    Raises:
        MendableError: a process cannot go on, for a reason that a user can mend, or so many died of
            one part.
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
                    raise MendableError(f"a process ended as it began, with status {event}")
                if lost is None:
                    continue
                deaths[lost[0]] += 1
                if deaths[lost[0]] == _MOST_DEATHS:
                    raise MendableError(
                        f"{_MOST_DEATHS} processes died of part {lost[0]}, the last with status "
                        f"{event} (-9: memory, perhaps; then fewer --workers help)"
                    )
                yield Event(lost[0], -process.rows)
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
    """One process, and the thread that listens to it.

    Attributes:
        ready: whether it has made its network.
        part: what it is at.
        rows: of that, so far.
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
        """Keep up with what it does."""
        self.ready = True
        self.rows += event.rows
        if event.done:
            self.part = None

    def give(self, part: Part | None) -> None:
        """Let it do a part; None lets it end."""
        self.part, self.rows = part, 0
        if part is not None:
            self._send(part)
        else:
            self.close()

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self.close()
        self._thread.join()

    def _send(self, thing: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, as the thread will say
            pickle.dump(thing, self._process.stdin)
            self._process.stdin.flush()

    def close(self) -> None:
        """Say that there is nothing more to do."""
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
                    break  # it has ended, in the middle of a word perhaps
                events.put((self, event))
        events.put((self, self._process.wait()))
