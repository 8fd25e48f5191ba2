"""Every kind of ``--data``, and errors that are found before training starts."""

import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from training_runs import make_images

from backbones.common.errors import DataError
from backbones.data.splits import open_splits
from backbones.training.recipe import Recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 12, "val": 6, "test": 9})


def colour(source, index):
    """Which channel is brightest on average: the class, in these images."""
    image, label = source.load(index)
    return int(np.asarray(image).mean((0, 1)).argmax()), label


def assert_usable(splits, train_size=12, validation_size=6, classes=3):
    assert (len(splits.train), len(splits.validation)) == (train_size, validation_size)
    assert len(splits.classes) == classes
    for source in (splits.train, splits.validation):
        for index in range(len(source)):
            seen, label = colour(source, index)
            assert seen == label
        assert source.name(0)


def test_folders(folder):
    splits = open_splits(Recipe(data=str(folder)))
    assert splits.classes == ["class0", "class1", "class2"]
    assert_usable(splits)
    assert_usable(open_splits(Recipe(data=str(folder), val_split="test")), validation_size=9)


def test_tar_archives(folder, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(folder / split, arcname=".")
    assert_usable(open_splits(Recipe(data=str(tmp_path))))
    with tarfile.open(tmp_path / "val.tar", "w:gz") as archive:
        archive.add(folder / "val", arcname=".")
    with pytest.raises(DataError, match=r"val\.tar is not an uncompressed tar"):
        open_splits(Recipe(data=str(tmp_path)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hugging_face_folders(folder, tmp_path):
    recipe = Recipe(data=f"hfds/{folder}", data_dir=str(tmp_path), val_split="validation")
    splits = open_splits(recipe)
    assert splits.classes == ["class0", "class1", "class2"]
    assert_usable(splits)


def test_torchvision_sets(folder):
    recipe = Recipe(data="torchvision/image_folder", data_dir=str(folder))
    assert_usable(open_splits(recipe))
    with pytest.raises(DataError, match="torch/cifar10"):
        open_splits(Recipe(data="torch/cifar10", data_dir=str(folder)))


def write_medmnist(path, labels=None, shape=(28, 28, 3)):
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 12), ("val", 6), ("test", 9)):
        numbers = np.arange(count)[:, None] % 3 if labels is None else labels[:count]
        images = generator.integers(0, 99, (count, *shape), dtype=np.uint8)
        for i in range(count):
            images[i, ..., int(numbers[i, 0]) % shape[-1]] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": numbers.astype(np.uint8)}
    np.savez(path, **arrays)


def test_medmnist(tmp_path):
    write_medmnist(tmp_path / "pathmnist.npz", np.arange(12)[:, None] // 4)
    recipe = Recipe(data="medmnist/pathmnist", data_dir=str(tmp_path))
    assert_usable(open_splits(recipe))
    recipe.val_split = "test"
    assert_usable(open_splits(recipe), validation_size=9)
    recipe.train_split = recipe.val_split = "val"
    assert len(open_splits(recipe).classes) == 3  # of which the split has two
    recipe.val_split = "holdout"
    with pytest.raises(DataError, match="no split 'holdout'; it has train, val and test"):
        open_splits(recipe)


def _cut(arrays):
    return {**arrays, "val_labels": arrays["val_labels"][:2]}


def _label_3(arrays):
    arrays["val_labels"][2] = 3
    return arrays


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"labels": np.full((12, 14), 2)}, None, "labels other than 0 and 1"),
        ({"labels": np.zeros((12, 3), np.int64)}, None, "AUC is undefined"),
        ({"shape": (8, 8, 8, 1)}, None, "not 2D"),
        ({}, _cut, "6 val images have 2 labels"),
        ({}, _label_3, r"set/val\[2\] has label 3, outside the 3 classes"),
    ],
)
def test_unsupported_medmnist_sets(options, change, message, tmp_path):
    write_medmnist(tmp_path / "set.npz", **options)
    if change is not None:
        with np.load(tmp_path / "set.npz") as archive:
            arrays = dict(archive)
        np.savez(tmp_path / "set.npz", **change(arrays))
    with pytest.raises(DataError, match=message):
        open_splits(Recipe(data="medmnist/set", data_dir=str(tmp_path)))


def test_missing_and_damaged_medmnist_files(tmp_path):
    recipe = Recipe(data="medmnist/chestmnist", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"chestmnist\.npz is missing: download it from https://"):
        open_splits(recipe)
    write_medmnist(tmp_path / "chestmnist.npz")
    data = (tmp_path / "chestmnist.npz").read_bytes()
    for damaged in (b"PK no", data[: len(data) // 2]):
        (tmp_path / "chestmnist.npz").write_bytes(damaged)
        with pytest.raises(DataError, match="is not a MedMNIST file"):
            open_splits(recipe)


def _only_heic(folder):
    (folder / "train" / "class9").mkdir()
    (folder / "train" / "class9" / "a.heic").touch()


def test_every_format_that_pillow_decodes(tmp_path):
    make_images(tmp_path, {"train": 9, "val": 6})
    image = Image.new("RGB", (8, 8))
    for ending in ("webp", "tif", "bmp", "gif"):
        image.save(tmp_path / "train" / "class0" / f"x.{ending}")
    (tmp_path / "train" / ".thumbnails").mkdir()
    splits = open_splits(Recipe(data=str(tmp_path)))
    assert len(splits.train) == 13 and len(splits.classes) == 3
    shutil.make_archive(str(tmp_path / "train"), "tar", tmp_path / "train")
    shutil.rmtree(tmp_path / "train")
    assert len(open_splits(Recipe(data=str(tmp_path))).train) == 13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "train" / "class9").mkdir(), "the class folder .*class9 is empty"),
        (_only_heic, "the class folder .*class9 has no images, but a.heic"),
        (lambda d: (d / "val").rename(d / "elsewhere"), "no split 'validation'"),
        (lambda d: (d / "val" / "class1").rename(d / "val" / "dog"), "training lacks: dog"),
        (lambda d: None, "has 3 classes, the model's head only 2"),
    ],
)
def test_unsupported_folders(change, message, tmp_path):
    make_images(tmp_path, {"train": 9, "val": 6})
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        open_splits(Recipe(data=str(tmp_path), num_classes=2 if "head" in message else None))


def test_missing_data(tmp_path):
    with pytest.raises(DataError, match="no data at .*nowhere"):
        open_splits(Recipe(data=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no data: give --data"):
        open_splits(Recipe())


def test_a_class_map(folder, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("class2\n\nclass1\nclass0\n")
    splits = open_splits(Recipe(data=str(folder), class_map=str(path)))
    assert splits.classes == ["class2", "1", "class1", "class0"]
    for index in range(len(splits.train)):
        seen, label = colour(splits.train, index)
        assert label == [3, 2, 0][seen]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"class2\nclass1\nclass2\n", "has 'class2' twice, in lines 1 and 3"),
        (b"\n", "is empty"),
        (bytes(range(256)), "is not a text file with one class per line"),
        (None, "cannot read class_map"),
    ],
)
@pytest.mark.parametrize("kind", ["{}", "hfds/{}", "wds/{}"])
def test_invalid_class_maps(kind, content, message, folder, tmp_path):
    path = tmp_path / "classes.pkl"  # timm would read it as a pickle
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_splits(Recipe(data=kind.format(folder), class_map=str(path)))
