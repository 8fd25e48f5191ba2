"""The order of the images, a function of seed and epoch, divided among the processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from backbones.common.generators import mix_seed
from backbones.common.processes import World

NO_LABEL = -1
"""Label of positions that are not counted: padding and unreadable images."""

Key = tuple[int, int]  # number of an image; seed of its augmentation, or NO_LABEL for padding


class TrainSampler(Sampler[list[Key]]):
    """Batches of keys: a permutation by seed and epoch, divided among the processes.

    Args:
        batch_size: of each process.
        repeats: copies of each image (repeated augmentation).
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, world: World, repeats: int = 1
    ) -> None:
        self.size, self.batch_size, self.seed, self.world = size, batch_size, seed, world
        self.repeats = repeats
        self.batches = size // (batch_size * world.size)
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[list[Key]]:
        order, seeds = self._epoch_order(self.epoch)
        for number in range(self.start, self.batches):
            yield self._keys(order, seeds, number)

    def images(self, epoch: int, update: int, accum_steps: int) -> list[int]:
        """The numbers of the images of an update, which has several batches."""
        order, seeds = self._epoch_order(epoch)
        batches = range(update * accum_steps, (update + 1) * accum_steps)
        return [index for batch in batches for index, _ in self._keys(order, seeds, batch)]

    def _epoch_order(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(self.size, generator=generator)
        # Copies of repeated augmentation go to different processes, each with its own seed.
        order = order.repeat_interleave(self.repeats)[: self.size]
        seeds = torch.randint(2**62, (self.size,), generator=generator)
        share = slice(self.world.rank, None, self.world.size)
        return order[share], seeds[share]

    def _keys(self, order: torch.Tensor, seeds: torch.Tensor, number: int) -> list[Key]:
        part = slice(number * self.batch_size, (number + 1) * self.batch_size)
        return list(zip(order[part].tolist(), seeds[part].tolist(), strict=True))


class ValidationSampler(Sampler[list[Key]]):
    """Batches of keys in order; process r has the images r, r + world, r + 2 world, …"""

    def __init__(self, size: int, batch_size: int, batches: int, world: World) -> None:
        self.size, self.batch_size, self.batches, self.world = size, batch_size, batches, world

    def __iter__(self) -> Iterator[list[Key]]:
        mine = list(range(self.world.rank, self.size, self.world.size))
        for number in range(self.batches):
            keys = [(i, 0) for i in mine[number * self.batch_size : (number + 1) * self.batch_size]]
            if len(keys) < self.batch_size and self.world.size > 1:
                keys += [(0, NO_LABEL)] * (self.batch_size - len(keys))
            yield keys
