"""The group of training processes, from torchrun's environment; possibly just one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from backbones.common.arguments import usable_device
from backbones.common.errors import RecipeError
from backbones.common.messages import first_line, shown

_kept_groups: list[Any] = []


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size``, on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` added over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The largest ``values`` of all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


class Consensus:
    """Per-step consensus of the processes: whether a loss was bad, to stop, or to save.

    Sent before the backward pass and read after that was queued, so that GPUs are never idle.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._on_gpu = world.device.type == "cuda"
        self._result = torch.zeros(3, pin_memory=self._on_gpu)
        self._arrived = torch.cuda.Event() if self._on_gpu else None

    def send(self, loss: torch.Tensor, signal: int, save: bool) -> None:
        """Send this process's state to the others."""
        others = torch.tensor([float(signal), float(save)])
        if self._on_gpu:
            others = others.pin_memory().to(loss.device, non_blocking=True)
        view = torch.cat([(~torch.isfinite(loss.detach())).float().view(1), others])
        self._result.copy_(self.world.max(view), non_blocking=self._on_gpu)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> tuple[bool, int, bool]:
        """Whether any loss was not finite, the signal that came (0: none), whether to save."""
        if self._arrived is not None:
            self._arrived.synchronize()
        bad, signal, save = self._result.tolist()
        return bool(bad), int(signal), bool(save)


@contextmanager
def world_of_processes(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun started, if any, and leave the group at the end.

    Without ``device``, it is a GPU if there is one.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(f"WORLD_SIZE must be the number of processes, not {shown(text)}")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and int(text) > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    target = usable_device(name, "device")
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, target)
        return
    try:
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise RecipeError(f"cannot join the other processes: {first_line(error)}") from error
    try:
        yield World(dist.get_rank(), dist.get_world_size(), target)
    finally:
        leave_processes()


def leave_processes() -> None:
    """Destroy the default process group.

    DDP would otherwise be its last owner and hold the GIL while gloo's threads end; these wait for
    the GIL to release their last tensors, a deadlock. Therefore a reference is kept here.
    """
    _kept_groups.append(dist.group.WORLD)
    dist.destroy_process_group()
