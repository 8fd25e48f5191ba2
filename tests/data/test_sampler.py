"""The order of the images of an epoch, divided among processes."""

from __future__ import annotations

import pytest
import torch

from backbones.common.processes import World
from backbones.data.sampler import TrainSampler


@pytest.mark.parametrize("size", [2, 3])
def test_copies_of_an_image_go_to_different_processes(size):
    """And each has its own augmentation."""
    parts = []
    for rank in range(size):
        world = World(rank, size, torch.device("cpu"))
        parts.append([key for batch in TrainSampler(60, 5, 1, world, size) for key in batch])
    for keys in zip(*parts, strict=True):
        assert len({image for image, _ in keys}) == 1
        assert len({seed for _, seed in keys}) == size


def test_a_batch_is_found_again_by_its_number():
    sampler = TrainSampler(61, 5, 42, World(1, 2, torch.device("cpu")))
    sampler.epoch = 3
    batches = list(sampler)
    assert sampler.batch(3, 2) == batches[2] != sampler.batch(4, 2)
    sampler.start = 2
    assert list(sampler) == batches[2:] and len(sampler) == len(batches) - 2
