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
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import backbones
from backbones.common.errors import MendableError
from backbones.embedding.network import Network
from backbones.embedding.worker import Event, Job, Worker
from ops.cpu.build.libraries import cores

Part = tuple[int, Any]

_PROGRAM = "from backbones.embedding.worker import main; main()"
# Give up on a part after so many processes died while embedding it.
_MOST_DEATHS = 3


def run_here(job: Job, network: Network, parts: Iterable[Part]) -> Generator[Event, None, None]:
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


def run_in_processes(
    job: Job, devices: list[str], parts: Iterable[Part]
) -> Generator[Event, None, None]:
    """Embed with one process for each of ``devices``; idle processes get the next part.

    A process that dies is replaced, and its part is embedded again.
    """
    pending = collections.deque(parts)
    events: queue.Queue[tuple[_Process, Event | int]] = queue.Queue()
    deaths: collections.Counter[int] = collections.Counter()
    running = [
        _Process(replace(job, device=device), len(devices), pending.popleft(), events)
        for device in devices[: len(pending)]
    ]
    try:
        while running:
            process, event = events.get()
            if isinstance(event, Event):
                if event.error:
                    raise MendableError(event.error)
                yield event
                if event.done and pending:
                    process.give(pending.popleft())
                elif event.done:
                    running.remove(process)
                    process.kill()
            elif process in running:
                number = process.part[0]
                deaths[number] += 1
                if deaths[number] == _MOST_DEATHS:
                    raise MendableError(
                        f"{_MOST_DEATHS} processes ended while computing part {number}, the last "
                        f"with status {event} (-9: probably out of memory; use fewer --workers)"
                    )
                running.remove(process)
                process.kill()
                running.append(_Process(process.job, len(devices), process.part, events))
    finally:
        for process in running:
            process.kill()


class _Process:
    """A worker process, and a thread that puts its events, and at last its status, in a queue."""

    def __init__(self, job: Job, share: int, part: Part, events: queue.Queue[Any]) -> None:
        self.job = job
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
        self._thread = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self._thread.start()
        self._send(job)
        self.give(part)

    def give(self, part: Part) -> None:
        """Let the process embed a part."""
        self.part = part  # which it is working on
        self._send(part)

    def kill(self) -> None:
        """End the process and the thread."""
        self._process.kill()
        self._thread.join()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _send(self, thing: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the thread reports that
            pickle.dump(thing, self._process.stdin)
            self._process.stdin.flush()

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
