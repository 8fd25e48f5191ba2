"""Batches: repeatable, divided evenly, complete, robust against broken files."""

import signal
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from training_runs import Runs, make_images

from backbones.common.errors import DataError
from backbones.common.processes import World
from backbones.data.batches import _start_worker
from backbones.data.corrupt import CorruptImages
from backbones.data.splits import open_splits
from backbones.training.loader import TrainLoader, ValidationLoader, allow_zero_bits
from backbones.training.recipe import Recipe

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 23, "val": 11})


@pytest.fixture
def make(folder, tmp_path):
    loaders = []

    def make(world=ALONE, kind=TrainLoader, folder=folder, allowed=0.0, **keys):
        recipe = Recipe(data=str(folder), **{"batch_size": 4, "workers": 0, **keys})
        splits = open_splits(recipe)
        source = splits.train if kind is TrainLoader else splits.validation
        corrupt = CorruptImages(tmp_path / "corrupt.txt", allowed)
        loaders.append(kind(source, CONFIG, recipe, world, corrupt))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def equal(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_an_epoch_is_repeatable_and_differs_from_the_next(make):
    loader = make(aa="rand-m9-mstd0.5-inc1", reprob=0.5)
    np.random.seed(0)
    np.random.normal()  # which makes two, and keeps one for the next call
    first = list(loader.epoch(1))
    state = torch.get_rng_state()
    assert equal(first, loader.epoch(1))
    assert equal(first[3:], loader.epoch(1, start=3))
    assert torch.equal(torch.get_rng_state(), state)  # the loop's own randomness is not touched
    assert np.random.normal() == np.random.RandomState(0).normal(size=2)[1]
    assert not equal(first, loader.epoch(2))
    assert not equal(first, make(seed=1, aa="rand-m9-mstd0.5-inc1").epoch(1))
    assert first[0][0].shape == (4, 3, 32, 32) and len(first) == 5


def test_loader_processes_make_the_same_batches(make):
    options = {"aa": "rand-m9-mstd0.5-inc1"}
    assert equal(make(**options).epoch(0), make(workers=2, **options).epoch(0))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_validation_sees_every_image_once(size, make):
    labels = []
    for rank in range(size):
        loader = make(World(rank, size, CPU), ValidationLoader)
        batches = [batch_labels for _, batch_labels in loader]
        assert len(batches) == len(loader)
        labels += torch.cat(batches).tolist()
    counted = [label for label in labels if label >= 0]
    assert sorted(counted) == sorted(i % 3 for i in range(11))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_validation_images_are_timms(crop_mode, make, folder, monkeypatch):
    monkeypatch.setitem(CONFIG, "crop_mode", crop_mode)
    batches = [images for images, _ in make(kind=ValidationLoader)]
    transform = create_transform(**CONFIG, is_training=False)
    paths = sorted((folder / "val").rglob("*.png"))
    wanted = [transform(Image.open(path)) for path in paths]
    assert torch.allclose(torch.cat(batches)[: len(paths)], torch.stack(wanted), atol=1e-6)


@pytest.mark.parametrize("aa", ["rand-m10-inc1", "rand-m10", "original", "augmix-m10", "3a"])
def test_augmentation_at_its_highest_magnitude(aa):
    """Pillow 13 refuses to posterize to 0 bits, which one image in a thousand is to be."""
    transform = create_transform(16, is_training=True, auto_augment=aa, use_prefetcher=True)
    allow_zero_bits(transform)
    steps = [step for step in transform.transforms if hasattr(step, "ops")]
    steps = [op for step in steps for op in step.ops]
    image = Image.new("RGB", (20, 20), (200, 100, 50))
    for operation in steps:
        operation.prob = 1.0
        assert operation(image).size == (20, 20)
    if aa == "rand-m10-inc1":
        (operation,) = (op for op in steps if op.name == "PosterizeIncreasing")
        assert operation(image).getextrema() == ((0, 0),) * 3
    assert transform(image).shape == (3, 16, 16)


@pytest.mark.parametrize("source", ["{}", "torch/image_folder"])
def test_16_bits_are_scaled(source, make, tmp_path):
    """Pillow's ``convert`` clips at 255, which makes nearly every image white."""
    for place in ("train/a", "val/a"):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 0x4040, np.uint16)).save(tmp_path / place / "0.png")
    data = source.format(tmp_path)
    options = {"folder": data, "data_dir": str(tmp_path), "batch_size": 1, "no_aug": True}
    for kind in (TrainLoader, ValidationLoader):
        loader = make(kind=kind, **options)
        batches = loader.epoch(0) if kind is TrainLoader else loader
        ((images, _),) = list(batches)
        assert torch.allclose(images, torch.tensor((0x40 / 255 - 0.5) / 0.25), atol=1e-5)


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "3a"])
def test_grey_images_are_augmented_too(aa, make, monkeypatch):
    for key, value in {"mean": (0.5,), "std": (0.25,), "input_size": (1, 32, 32)}.items():
        monkeypatch.setitem(CONFIG, key, value)
    for images, _ in make(aa=aa, in_chans=1, grayscale_prob=0.5).epoch(0):
        assert images.shape == (4, 1, 32, 32)


def test_flips(make):
    """Whole images, so that only the flips are left of the augmentation."""
    still = {"scale": (1.0, 1.0), "ratio": (0.9, 0.9), "color_jitter": 0.0, "hflip": 0.0}
    still["train_interpolation"] = "bilinear"
    images = next(iter(make(**still).epoch(0)))[0]
    for keys, axis in (({"hflip": 1.0}, 3), ({"vflip": 1.0}, 2)):
        flipped = next(iter(make(**{**still, **keys}).epoch(0)))[0]
        torch.testing.assert_close(flipped, images.flip(axis), atol=0.02, rtol=0)
        assert not torch.allclose(flipped, images, atol=0.02, rtol=0)


def test_too_few_images(make):
    with pytest.raises(DataError, match="23 images do not fill 1 batch"):
        make(batch_size=24)
    with pytest.raises(DataError, match=r"for 2 process\(es\)"):
        make(World(0, 2, CPU), batch_size=12)


@pytest.fixture
def broken(tmp_path):
    folder = make_images(tmp_path / "broken", {"train": 30, "val": 12})
    for split, names in (("train", ("000", "001")), ("val", ("003",))):
        for name in names:
            (path,) = (folder / split).glob(f"*/{name}.png")
            path.write_bytes(path.read_bytes()[:200])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_training_images_are_replaced_and_named(workers, make, broken, tmp_path):
    # As many as are allowed.
    loader = make(folder=broken, allowed=2 / 30, batch_size=10, workers=workers)
    batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    assert [len(labels) for _, labels in batches] == [10] * 6
    assert loader.corrupt.count() == 2
    names = (tmp_path / "corrupt.txt").read_text()
    assert "000.png" in names and "001.png" in names


def test_an_oversized_image_counts_as_broken(make, broken, tmp_path):
    """Pillow's error for it is of no kind that its other errors are."""
    small = tmp_path / "small.bmp"
    Image.new("RGB", (8, 8)).save(small)
    data = bytearray(small.read_bytes())
    data[18:26] = struct.pack("<ii", 70000, 70000)
    for path in broken.glob("train/*/00[01].png"):
        path.write_bytes(data)
    loader = make(folder=broken, allowed=0.1, batch_size=10)
    assert sum(len(labels) for _, labels in loader.epoch(0)) == 30
    assert (tmp_path / "corrupt.txt").read_text().count("DecompressionBombError") == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_end_the_run(workers, make, broken):
    loader = make(folder=broken, allowed=0.01, batch_size=10, workers=workers)
    with pytest.raises(
        DataError, match=r"of 30 images cannot be read, more than max_corrupt=0\.01"
    ):
        list(loader.epoch(0))


@pytest.mark.parametrize("kind", [TrainLoader, ValidationLoader])
def test_no_image_at_all_can_be_read(kind, make, tmp_path):
    """``max_corrupt: 1`` allows all of them, and the search for another one would have no end."""
    folder = make_images(tmp_path / "none", {"train": 6, "val": 4})
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no")
    loader = make(kind=kind, folder=folder, allowed=1.0)
    with pytest.raises(DataError, match=r"none of the [64] images can be read; .*corrupt\.txt"):
        list(loader.epoch(0) if kind is TrainLoader else loader)


def test_an_image_counts_once_in_all_processes(tmp_path):
    here, there = (CorruptImages(tmp_path / "corrupt.txt", 0.5) for _ in range(2))
    for corrupt, name in ((here, "a"), (there, "a"), (here, "b")):
        corrupt.add(name, ValueError("two\nlines"), 5)
    assert here.count() == there.count() == 2


def test_broken_validation_images_are_not_counted(make, broken):
    loader = make(kind=ValidationLoader, folder=broken, allowed=0.1)
    labels = torch.cat([labels for _, labels in loader]).tolist()
    assert len(labels) == 12 and labels.count(-1) == 1


def test_a_run_over_broken_images(broken, tmp_path, capsys):
    runs = Runs(tmp_path, capsys, f"--data={broken}", "--epochs=1")
    assert "corrupt_train.txt" in runs.train("--max-corrupt=0.1")
    assert "cannot be read, more than max_corrupt" in runs.refuse("--overwrite", "--max-corrupt=0")


def test_a_loader_process_keeps_an_inherited_ignore():
    numbers = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _start_worker(0)
        assert {signal.getsignal(number) for number in numbers} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
