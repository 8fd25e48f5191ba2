"""Streamed images: shards and hub data sets, broken data, two processes."""

import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import Runs, freeze_batch_norm, join, make_images, same

from backbones.common.errors import DataError
from backbones.common.processes import World
from backbones.data.corrupt import CorruptImages
from backbones.data.splits import open_splits
from backbones.data.streams import StreamImages, StreamSource
from backbones.training.loader import ValidationLoader
from backbones.training.recipe import Recipe
from backbones.training.resumable import load_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def write_shards(folder, split, count, shards, broken=(), labels=3, images=None):
    folder.mkdir(exist_ok=True)
    source = [b"no" if n in broken else data for n, data in enumerate(images or noise(count))]
    for shard in range(shards):
        with tarfile.open(folder / f"{split}-{shard:04}.tar", "w") as archive:
            for number in range(shard, count, shards):
                for suffix, data in (
                    ("png", source[number]),
                    ("cls", str(number % labels).encode()),
                ):
                    member = tarfile.TarInfo(f"{number:05}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def noise(count):
    generator = np.random.default_rng(0)
    images = []
    for number in range(count):
        pixels = generator.integers(0, 150, (20, 20, 3), dtype=np.uint8)
        pixels[..., number % 3] += 100
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "png")
        images.append(data.getvalue())
    return images


@pytest.fixture
def sharded(tmp_path, capsys):
    """A function that writes shards, and makes trainings with them."""

    def write(train=32, val=10, val_broken=(), **options):
        folder = write_shards(tmp_path / "shards", "train", train, 4, **options)
        write_shards(folder, "val", val, 2, broken=val_broken)
        return Runs(
            *(tmp_path, capsys, f"--data=wds/{folder}", "--num-classes=3", "--epochs=1"),
            *(f"--val-num-samples={val}", f"--train-split=train-{{0000..0003}}.tar|{train}"),
            f"--val-split=val-{{0000..0001}}.tar|{val}",
        )

    return write


@pytest.fixture
def hub(tmp_path, capsys):
    """A function that makes trainings with a folder that is read like a set of the hub."""

    def make(train):
        folder = make_images(tmp_path / "images", {"train": train, "val": 6})
        return Runs(
            *(tmp_path, capsys, f"--data=hfids/{folder}", f"--data-dir={tmp_path / 'cache'}"),
            *(f"--num-samples={train}", "--val-num-samples=6", "--val-split=validation"),
            *("--download", "--batch-size=4", "--epochs=1"),
        )

    return make


def assert_resumes(runs, *words):
    """A run that was killed within an epoch ends as one that was not."""
    words = (*words, "--epochs=2", "--save-every-steps=1", "--drop=0.1")
    runs.train(*words, "--name=undisturbed")
    runs.kill_at("link", 4, *words)
    assert load_state(runs.folder / "last.pt")["step"] > 0
    assert join([runs.start(*words, "--resume=auto")]) == [0]
    assert same(runs.state("undisturbed"), runs.state())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_webdataset_shards_resume_within_an_epoch(workers, sharded):
    assert_resumes(sharded(40), f"--workers={workers}", "--reprob=0.3")


@pytest.mark.slow
def test_hugging_face_streams_resume_within_an_epoch(hub):
    assert_resumes(hub(24))


def test_webdataset_shards_from_a_command(sharded):
    runs = sharded()
    start = f"pipe:cat {runs.output}/shards"
    words = ["--data=wds/", f"--train-split={start}/train-{{0000..0003}}.tar|32"]
    runs.train(*words, f"--val-split={start}/val-{{0000..0001}}.tar|10")
    row = (runs.folder / "summary.csv").read_text().splitlines()[1]
    assert row.startswith("0,4,")  # epoch 0, 32 / 8 updates


def validation_batches(folder, images, max_corrupt=0.0):
    for split in ("train", "val"):
        shards = write_shards(folder / "shards", split, len(images), 1, images=images)
    recipe = Recipe(
        data=f"wds/{shards}",
        train_split=f"train-0000.tar|{len(images)}",
        val_split=f"val-0000.tar|{len(images)}",
        num_classes=3,
        batch_size=2,
        workers=0,
    )
    config = {
        **{"input_size": (3, 16, 16), "interpolation": "bilinear", "crop_pct": 1.0},
        **{"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_mode": "center"},
    }
    source = open_splits(recipe).validation
    corrupt = CorruptImages(folder / "corrupt.txt", max_corrupt)
    world = World(0, 1, torch.device("cpu"))
    return list(ValidationLoader(source, config, recipe, world, corrupt))


def encoded(image, format):
    data = io.BytesIO()
    image.save(data, format)
    return data.getvalue()


def test_16_bits_are_scaled(tmp_path):
    data = encoded(Image.fromarray(np.full((20, 20), 0x4040, np.uint16)), "png")
    ((images, _),) = validation_batches(tmp_path, [data] * 2)
    assert torch.allclose(images, torch.tensor(0x40 / 255))


def test_no_program_is_started_for_an_image(tmp_path):
    picture = Image.new("RGB", (20, 20), "white")
    data = [encoded(picture, format) for format in ("png", "eps", "png", "png")]
    batches = validation_batches(tmp_path, data, max_corrupt=0.5)
    assert sum(len(images) for images, _ in batches) == 3  # in validation, nothing replaces it
    assert "cannot identify image" in (tmp_path / "corrupt.txt").read_text()


@pytest.mark.parametrize(("seed", "seen"), [(None, [10, 30]), (0, [10, 10, 30, 30])])
def test_images_of_the_hub_that_cannot_be_read(seed, seen, tmp_path):
    """In training, others take their place; in validation, nothing does."""

    class Stream(list):
        reader = SimpleNamespace(input_key="image", _lazy_init=lambda: None)
        reader.ds = SimpleNamespace(cast_column=lambda *_: None)

    def encode(value):
        return {"bytes": encoded(Image.new("L", (4, 4), value), "png"), "path": None}

    broken = {"bytes": b"no image", "path": "broken.png"}
    stream = Stream((image, 1) for image in (encode(10), broken, encode(30), broken))
    corrupt = CorruptImages(tmp_path / "corrupt.txt", 0.5)
    source = StreamSource(list, 4, 3)
    augment = lambda image: (image.getpixel((0, 0)), torch.rand(()).item())  # noqa: E731
    found = list(StreamImages(source, stream, augment, "L", corrupt, seed))
    assert [(value, label) for (value, _), label in found] == [(value, 1) for value in seen]
    assert len({drawn for (_, drawn), _ in found}) == len(seen)
    assert (tmp_path / "corrupt.txt").read_text().count("broken.png\t") == 1


def test_a_stream_of_unknown_length(tmp_path):
    write_shards(tmp_path / "shards", "train", 8, 1)
    recipe = Recipe(data=f"wds/{tmp_path}/shards", train_split="train-{0000..0000}.tar")
    with pytest.raises(DataError, match="num_samples"):
        open_splits(recipe)
    recipe.num_samples = recipe.val_num_samples = 8
    recipe.val_split = recipe.train_split
    with pytest.raises(DataError, match="give --num-classes"):
        open_splits(recipe)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_of_shards_are_replaced_and_named(workers, sharded):
    runs = sharded(broken=(5, 9), val_broken=(3,))
    runs.train("--max-corrupt=0.1", f"--workers={workers}")
    named = (runs.folder / "corrupt_train.txt").read_text()
    assert "train-0001.tar/00005\t" in named and "train-0001.tar/00009\t" in named
    assert len({line.split("\t")[0] for line in named.splitlines()}) == 2
    assert "val-0001.tar/00003\t" in (runs.folder / "corrupt_validation.txt").read_text()
    assert runs.state()["updates"] == 4


def test_too_many_broken_images_of_shards_end_the_run(sharded):
    runs = sharded(broken=(5, 9))
    for workers in (0, 2):
        said = runs.refuse("--max-corrupt=0.01", f"--workers={workers}", "--overwrite")
        assert "of 32 images cannot be read, more than max_corrupt=0.01 allows" in said


def test_a_truncated_shard_is_named(sharded):
    runs = sharded()
    path = runs.output / "shards" / "train-0002.tar"
    path.write_bytes(path.read_bytes()[:3000])
    runs.train("--max-corrupt=0.1")
    assert "train-0002.tar\t" in (runs.folder / "corrupt_train.txt").read_text()


@pytest.mark.parametrize(
    ("labels", "words", "message"),
    [
        (5, [], "has label 3, outside the 3 classes 0..2"),
        (3, ["--workers=5"], "4 shard(s) are too few for 5 loader processes"),
        (3, ["--train-split=train-{0000..0009}.tar|32"], "there is no shard "),
    ],
)
def test_unsupported_shards(labels, words, message, sharded):
    assert message in sharded(labels=labels).refuse(*words)


def test_two_processes_share_shards_in_equal_steps(sharded):
    """Both make the same number of updates, and validation counts each of the 11 images once."""
    runs, both = sharded(40, 11), (freeze_batch_norm,) * 2
    words = ("--lr=0", "--min-lr=0", "--warmup-lr=0", "--ema")
    assert join(runs.start_two(*words, before=both)) == [0, 0]
    state = runs.state()
    assert state["updates"] == 40 // 16
    assert join([runs.start(*words, "--overwrite", before=freeze_batch_norm)]) == [0]
    two, alone = state["history"][0], runs.state()["history"][0]
    assert two["ema_loss"] == pytest.approx(alone["ema_loss"], rel=1e-5)
    assert two["ema_top1"] == pytest.approx(alone["ema_top1"])


@pytest.mark.parametrize("broken", [(), ("train/class1/004.png", "val/class2/005.png")])
def test_a_hub_set(broken, hub):
    """Images that cannot be read are named, and others take their place."""
    runs = hub(12)
    for name in broken:
        path = runs.output / "images" / name
        path.write_bytes(path.read_bytes()[:200])
    runs.train("--max-corrupt=0.2")
    for split in ("train", "validation") if broken else ():
        named = (runs.folder / f"corrupt_{split}.txt").read_text()
        assert {"train": "004.png\t", "validation": "005.png\t"}[split] in named
    assert (runs.folder / "summary.csv").read_text().splitlines()[1].startswith("0,3,")
