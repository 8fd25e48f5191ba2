"""Pairs of patches: their source, and that the seed determines everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from restoration_runs import make_pictures

from backbones.common.errors import DataError
from backbones.common.processes import World
from backbones.data.corrupt import CorruptImages
from backbones.restoration.data import (
    TRAINING,
    VALIDATION,
    Patches,
    PatchLoader,
    degrade_picture,
    find_pictures,
    load_truth,
)
from backbones.restoration.degrade import compress
from backbones.restoration.metrics import quantize
from backbones.restoration.pictures import to_tensor
from backbones.restoration.recipe import RestorationRecipe
from backbones.restoration.resize import resize_bicubic

CPU = torch.device("cpu")


def corrupt(tmp_path: Path, allowed: float = 0.0) -> CorruptImages:
    return CorruptImages(tmp_path / "corrupt.txt", allowed)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_patch_is_a_part_of_the_whole(scale, tmp_path):
    """As if the smaller picture had been made of the whole one, also at its edges."""
    pixels = np.random.default_rng(0).integers(0, 256, (61, 74, 3), dtype=np.uint8)
    whole = to_tensor(pixels, 3)[:, : 61 // scale * scale, : 74 // scale * scale]
    small = quantize(resize_bicubic(whole, 1 / scale))
    recipe = RestorationRecipe(patch_size=6, symmetries=False)
    patches = Patches([], recipe, scale, corrupt(tmp_path))
    places = set()
    for seed in range(60):
        degraded, truth = patches.cut(pixels, np.random.default_rng(seed))
        generator = np.random.default_rng(seed)
        top = int(generator.integers(small.shape[1] - 5))
        left = int(generator.integers(small.shape[2] - 5))
        assert torch.equal(degraded, small[:, top : top + 6, left : left + 6])
        rows, columns = (slice(scale * n, scale * (n + 6)) for n in (top, left))
        assert torch.equal(truth, whole[:, rows, columns])
        places.add((top, left))
    assert len(places) > 30


def test_flips_and_turns_are_the_same_for_both(tmp_path):
    """All 8 symmetries come, and shrinking the flipped truth gives the flipped patch."""
    pixels = np.zeros((24, 24, 3), np.uint8)
    pixels[:8, :12, 0], pixels[4:20, 16:, 1] = 200, 90
    patches = Patches([], RestorationRecipe(patch_size=12), 2, corrupt(tmp_path))
    seen = set()
    for seed in range(60):
        degraded, truth = patches.cut(pixels, np.random.default_rng(seed))
        torch.testing.assert_close(
            degraded, quantize(resize_bicubic(truth, 0.5)), atol=5e-3, rtol=0
        )
        seen.add(truth.numpy().tobytes())
    assert len(seen) == 8


def test_every_quality_comes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    recipe = RestorationRecipe(patch_size=8, task="jpeg", quality=(20, 22))
    patches = Patches([], recipe, 1, corrupt(tmp_path))
    pairs = [patches.cut(pixels, np.random.default_rng(seed)) for seed in range(20)]
    found = [
        {q for q in range(18, 25) if torch.equal(degraded, compress(truth, q))}
        for degraded, truth in pairs
    ]
    assert all(found) and set.union(*found) >= {20, 21, 22} and not set.union(*found) & {18, 24}


def test_batches_follow_from_seed_epoch_and_place(tmp_path):
    paths = find_pictures(str(make_pictures(tmp_path / "p", 3)), True)
    recipe = RestorationRecipe(
        patch_size=8, batch_size=2, updates_per_epoch=5, workers=0, task="denoise", cache=True
    )
    loader = PatchLoader(paths, recipe, 1, World(0, 1, CPU), corrupt(tmp_path))
    batches = list(loader.epoch(3))
    assert len(batches) == 5 and batches[0][0].shape == batches[0][1].shape == (2, 3, 8, 8)
    later = list(loader.epoch(3, start=3))
    for (a, b), (c, d) in zip(batches[3:], later, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(next(iter(loader.epoch(4)))[1], batches[0][1])
    assert len(loader.names(3, 1)) == 2 and set(loader.names(3, 1)) <= set(map(str, paths))
    used = [name for update in range(3) for name in loader.names(0, update)]
    assert len(used) == 6
    for path in paths:
        path.unlink()
    assert torch.equal(next(iter(loader.epoch(3)))[1], batches[0][1])  # of what it has kept


def test_unreadable_pictures_are_replaced(tmp_path):
    folder = make_pictures(tmp_path / "p", 3)
    (folder / "1.png").write_bytes(b"no picture")
    paths = find_pictures(str(folder), True)
    recipe = RestorationRecipe(patch_size=8)
    degraded, truth = Patches(paths, recipe, 2, corrupt(tmp_path, 0.5))[(1, 0)]
    assert degraded.shape == (3, 8, 8) and truth.shape == (3, 16, 16)
    assert "1.png" in (tmp_path / "corrupt.txt").read_text()
    with pytest.raises(DataError, match="1 of 3 images cannot be read"):
        Patches(paths, recipe, 2, corrupt(tmp_path))[(1, 0)]


def test_validation_is_the_same_every_time():
    truth = torch.rand((3, 24, 24), generator=torch.Generator().manual_seed(0))
    recipe = RestorationRecipe(task="denoise", sigma=(15.0, 50.0))
    for number, sigma in enumerate((15, 50)):
        degraded, same = degrade_picture(recipe, truth, 1, number)
        assert same is truth and torch.equal(degraded, degrade_picture(recipe, truth, 1, number)[0])
        assert (degraded - truth).std().item() * 255 == pytest.approx(sigma, rel=0.1)
    jpeg = RestorationRecipe(task="jpeg")
    errors = [(degrade_picture(jpeg, truth, 1, n)[0] - truth).abs().mean() for n in range(4)]
    assert errors == sorted(set(errors), reverse=True)  # qualities 10, 20, 30, 40
    sharp, plain = (
        degrade_picture(RestorationRecipe(task="real", usm=usm), truth, 2, 0)
        for usm in (True, False)
    )
    assert sharp[0].shape == (3, 12, 12) and torch.equal(sharp[0], plain[0])
    assert not torch.equal(sharp[1], truth) and plain[1] is truth


def test_photographs_are_inside_the_packages():
    training, validation = (find_pictures("photographs", t) for t in (True, False))
    assert [p.name for p in training] == list(TRAINING)
    assert not {p.name for p in training} & {p.name for p in validation}
    assert [p.name for p in validation] == list(VALIDATION)
    assert load_truth(validation[1], 3, 2).shape == (3, 300, 450)
    assert load_truth(training[2], 1, 4).shape == (1, 512, 512)


def test_missing_pictures_are_named(tmp_path):
    with pytest.raises(DataError, match="give --val-pictures a folder"):
        find_pictures("", False)
    with pytest.raises(DataError, match="train_pictures: no image at"):
        find_pictures(str(tmp_path), True)
    make_pictures(tmp_path / "a", 2)
    assert len(find_pictures(f"{tmp_path}/*/*.png", True)) == 2
