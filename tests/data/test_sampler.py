"""The order of the images of an epoch, divided among processes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from backbones.common.processes import World
from backbones.data.sampler import TrainSampler


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_processes_share_an_epoch_in_equal_parts(size, repeats):
    """Copies of an image go to different processes, each with its own augmentation."""
    parts = []
    for rank in range(size):
        sampler = TrainSampler(61, 5, 42, World(rank, size, torch.device("cpu")), repeats)
        sampler.epoch = 7
        parts.append([key for batch in sampler for key in batch])
    assert {len(part) for part in parts} == {61 // (5 * size) * 5}
    keys = [key for part in parts for key in part]
    assert len({seed for _, seed in keys}) == len(keys)
    assert max(Counter(image for image, _ in keys).values()) == repeats
    if repeats == size:
        for copies in zip(*parts, strict=True):
            assert len({image for image, _ in copies}) == 1


def test_a_batch_is_found_again_by_its_number():
    sampler = TrainSampler(61, 5, 42, World(1, 2, torch.device("cpu")))
    sampler.epoch = 3
    batches = list(sampler)
    wanted = [index for index, _ in batches[2]]
    assert sampler.images(3, 2, 1) == wanted != sampler.images(4, 2, 1)
    sampler.start = 2
    assert list(sampler) == batches[2:]
