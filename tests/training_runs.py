"""Small trainings for the tests: a folder of images, a tiny model, runs that can be killed."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import train_cls
from backbones.common.processes import leave_processes
from backbones.training.resumable import load_state

# A block without attention, a downsampling, and a block with attention.
MODEL_ARGS = {"dims": [16, 24], "depths": [1, 1], "attn_dims": [0, 8]}
TINY = ["--model=shvit_s1", f"--model-args={json.dumps(MODEL_ARGS)}"]
QUICK = [
    *TINY,
    *("--img-size=32", "--batch-size=8", "--workers=0", "--threads=1", "--device=cpu"),
    *("--lr=1e-3", "--warmup-epochs=1", "--save-every-minutes=0"),
]

# Time limit of a run in seconds. Runs take seconds; one that hangs fails its test and prints its
# stacks. Twice this limit is below the timeout of a test.
PATIENCE = 140

# The server is a separate Python process that takes its sys.path from here.
_folders = [str(Path(__file__).parent), str(Path(train_cls.__file__).parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([*_folders, os.environ.get("PYTHONPATH", "")])
# A server imports torch and the library once, and trains a little, since a process's first steps
# take longer than all the rest of a run; each run is forked from it within milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["training_warm_up"])


_started: list[Run] = []


def a_few(families: Sequence[str]) -> list[Any]:
    """Values of a test of every family: those of other kinds of blocks run always."""
    kinds = {"efficientvit", "inception_next", "shvit", "van", "vrwkv"}
    return [f if f in kinds else pytest.param(f, marks=pytest.mark.slow) for f in families]


def end_all() -> None:
    """Kill what still runs."""
    while _started:
        process = _started.pop()
        if process.is_alive():
            kill(process)


class Run(_context.Process):  # type: ignore[name-defined]
    """A training in a process of its own; waiting for it has a time limit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience = PATIENCE

    def start(self) -> None:
        super().start()
        _started.append(self)

    def wait_for(self, path: Path) -> None:
        """Wait until the run has written ``path``; fail if it ends before, or takes too long."""
        until = time.monotonic() + self._patience
        while not path.exists():
            assert self.is_alive(), f"{self.name} ended with {self.exitcode} without {path}"
            assert time.monotonic() < until, f"{self.name} has not written {path}"
            time.sleep(0.01)

    def join(self, timeout: float | None = None) -> None:
        """Wait for ``timeout`` seconds; without one, fail if it exceeds the time limit."""
        super().join(timeout or self._patience)
        if not self.is_alive():
            self._stacks(self.pid).unlink(missing_ok=True)
        elif timeout is None:
            super().kill()
            stacks = self._stacks(self.pid)
            stood = stacks.read_text() if stacks.exists() else "it had not begun"
            raise AssertionError(f"{self.name} still ran after {self._patience} s:\n{stood}")

    def run(self) -> None:
        with self._stacks(os.getpid()).open("w") as file:
            faulthandler.dump_traceback_later(self._patience / 2, file=file)
            try:
                super().run()
            finally:
                faulthandler.cancel_dump_traceback_later()

    @staticmethod
    def _stacks(pid: int | None) -> Path:
        """The file that a run dumps its threads' stacks to after half of its time limit."""
        return Path(tempfile.gettempdir()) / f"training-run-{pid}.stacks"


def make_images(folder: Path, counts: dict[str, int], classes: int = 3) -> Path:
    """Write ``folder/SPLIT/CLASS/N.png``: noise whose colour depends on the class."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            label = number % classes
            place = folder / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 150, (40, 36, 3), dtype=np.uint8)
            pixels[..., label % 3] += 100
            Image.fromarray(pixels).save(place / f"{number:03}.png")
    return folder


def train(*arguments: str, pictures: bool = False) -> int:
    """Run ``train_cls.py`` in this process, by default without plots, which would dominate."""
    with unflushed():
        return train_cls.main([*QUICK, *arguments]) if pictures else _train(*arguments)


def _train(*arguments: str) -> int:
    with (
        patch.object(train_cls.pictures, "draw_curves"),
        patch.object(train_cls.pictures, "draw_predictions"),
    ):
        return train_cls.main([*QUICK, *arguments])


@contextmanager
def unflushed() -> Iterator[None]:
    """Within the block, ``os.fsync`` only checks the descriptor.

    The files of a killed process are safe with the kernel; only a power failure would show whether
    they had reached the disk, and waiting for it takes as long as the training itself.
    """
    with patch.object(os, "fsync", _check_descriptor):
        yield


def _check_descriptor(descriptor: int) -> None:
    os.fstat(descriptor)


def start(
    *arguments: str,
    before: Callable[[], None] | None = None,
    env: dict[str, str] | None = None,
    train: Callable[..., int] = _train,
) -> Run:
    """Start ``train`` (by default ``train_cls.py``) in a process of its own, after ``before``."""
    process = Run(target=_run, args=(train, arguments, before, env or {}))
    process.start()
    return process


def start_two(
    *arguments: str,
    before: Sequence[Callable[[], None] | None] = (None, None),
    launch: Callable[..., Run] = start,
) -> list[Run]:
    """Start two cooperating processes of ``train_cls.py``, or of what ``launch`` starts."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        launch(
            *arguments,
            before=before[rank],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def free_port() -> int:
    """A free port outside the range from which the system assigns ports."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as server, suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


def join(processes: Sequence[Run]) -> list[int | None]:
    """Wait for all processes; returns their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _run(
    train: Callable[..., int],
    argv: tuple[str, ...],
    before: Callable[[], None] | None,
    env: dict[str, str],
) -> None:
    os.environ.update(env)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    # As without a fork server around: another one, of the loaders, would take seconds to start.
    multiprocessing.set_start_method("fork", force=True)
    with unflushed():
        if before is not None:
            before()
        os._exit(train(*argv))


class Runs:
    """Trainings with one set of images into one folder, by default into its folder ``run``.

    Args:
        output: the folder.
        capsys: of the test, for the messages.
        words: options of all of them.
        train, start: functions for a training in this process, and in one of its own.
    """

    def __init__(
        self,
        output: Path,
        capsys: pytest.CaptureFixture[str],
        *words: str,
        train: Callable[..., int] = train,
        start: Callable[..., Run] = start,
    ) -> None:
        self.output, self.folder, self._capsys = output, output / "run", capsys
        self._words, self._train, self._start = words, train, start

    def words(self, *more: str) -> tuple[str, ...]:
        """A command line; of an option that comes twice, the last one counts."""
        return (*self._words, f"--output={self.output}", "--name=run", *more)

    def train(self, *more: str) -> str:
        """Train to the end; returns what is printed."""
        assert self._train(*self.words(*more)) == 0
        return self._capsys.readouterr().out

    def refuse(self, *more: str) -> str:
        """Fail with a message of one line, which is returned."""
        assert self._train(*self.words(*more)) == 2
        said = self._capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    def start(self, *more: str, before: Callable[[], None] | None = None) -> Run:
        """Start a training in a process of its own, which runs ``before`` first."""
        return self._start(*self.words(*more), before=before)

    def start_two(self, *more: str, **options: Any) -> list[Run]:
        """Start two processes of one training, like torchrun."""
        return start_two(*self.words(*more), launch=self._start, **options)

    def kill_at(self, call: str, number: int, *more: str) -> None:
        """Start a training that is killed at a call, see :func:`kill_at_call`."""
        process = self.start(*more, before=partial(kill_at_call, call, number))
        assert join([process]) == [-signal.SIGKILL]

    def state(self, name: str = "run") -> dict[str, Any]:
        """See :func:`final_state`."""
        return final_state(self.output / name)


def ignore_signals() -> None:
    """As ``nohup`` and the shell's background do."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def fork_loaders_from_a_server() -> None:
    """Start loader processes like Python 3.14 does by default."""
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["training_runs"])


def kill_at_call(name: str, number: int, sent: int = signal.SIGKILL) -> None:
    """Send a signal to this process at call ``number`` of ``os.<name>``, counted from 0.

    Functions for ``before`` are defined here and not in the test's module, since the run imports
    them by the name of their module.
    """
    original, calls = getattr(os, name), iter(range(number))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), sent)
        return original(*args, **kwargs)

    setattr(os, name, call)


def freeze_batch_norm() -> None:
    """Use running statistics: those of half a batch would differ from those of the whole."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return nn.Module.train(self, False)

    nn.modules.batchnorm._BatchNorm.train = train


def start_leaving(port: int) -> Run:
    """Start a process that leaves its group while gloo's threads still hold Python tensors."""
    process = Run(target=_leave, args=(port,))
    process.start()
    return process


def _leave(port: int) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    net = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    for _ in range(50):
        dist.all_reduce(torch.zeros(100_000), async_op=True)
    leave_processes()
    del net
    os._exit(0)


def kill(process: Run) -> None:
    """Send SIGKILL and wait."""
    process.kill()
    process.join()


def final_state(folder: Path) -> dict[str, Any]:
    """The contents of ``last.pt`` except what differs between runs: clocks and options."""
    state = load_state(folder / "last.pt")
    for row in state["history"]:
        for key in ("images_per_second", "data_wait", "memory_mb", "seconds"):
            del row[key]
    for key in ("recipe", "seconds", "waited"):
        del state[key]
    return state


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are bit-identical."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
