"""Whole programs, for ``benchmark.py --op``: `embed`, training, and a process's first image."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from contenders import CONTENDERS
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from torch import Tensor, nn
from torchvision.io import decode_jpeg

import backbones
from backbones.cli.reports import load_report, parsed, put_rows, write_report
from backbones.cli.timing import machine
from backbones.common.arguments import nonempty_path, whole
from backbones.common.console import Parser
from backbones.common.files import save_weights
from backbones.common.images import installed_decoder, open_image, open_pixels
from backbones.common.processes import World
from backbones.common.progress import Progress
from backbones.common.signals import StopRequest
from backbones.core.from_timm import PREFIX
from backbones.data.corrupt import CorruptImages
from backbones.embedding import embed
from backbones.embedding.hnsw import open_graph
from backbones.embedding.local import cores
from backbones.embedding.network import Network
from backbones.embedding.rows import unit
from backbones.embedding.search import search
from backbones.embedding.shard_writer import ShardWriter
from backbones.embedding.table import identity, load, schema, shard_path, write_metadata
from backbones.embedding.worker import Images
from backbones.restoration.data import TRAINING, VALIDATION, find_photographs
from backbones.training import build, optimization
from backbones.training.data import open_splits
from backbones.training.loader import TrainLoader
from backbones.training.recipe import Recipe
from ops.cpu import policy

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "docs" / "performance"

# -- embedding: images, weights, tables ------------------------------------------------------------

MODELS = ("shvit_s1", "van_b0", "unireplknet_a")
IMAGES, SIZE = 512, (500, 375)
_SCRIPT = """
import json, sys, time
import numpy as np, timm, torch
import backbones  # registers what timm lacks
from pathlib import Path
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
name, checkpoint, folder, batch, processes, first = sys.argv[1:]
model = timm.create_model(name).eval()
model.load_state_dict(load_file(checkpoint))
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
class Photos(Dataset):
    def __init__(self): self.paths = sorted(Path(folder).rglob("*.jpg"))
    def __len__(self): return len(self.paths)
    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image: return transform(image.convert("RGB"))
done, begun = 0, None
with torch.inference_mode():
    for images in DataLoader(Photos(), int(batch), num_workers=int(processes)):
        features = model.forward_head(model.forward_features(images), pre_logits=True).numpy()
        if begun is None: np.save(first, features); begun = time.perf_counter()
        else: done += len(images)
print(json.dumps(done / (time.perf_counter() - begun)))
"""


def make_photos(
    folder: Path, copies: int, size: tuple[int, int] = SIZE, count: int = IMAGES
) -> Path:
    """Write ``count`` random crops of photographs as JPEGs, each under ``copies`` names."""
    rng = np.random.default_rng(0)
    scenes = [open_image(path) for path in find_photographs(TRAINING + VALIDATION)]
    for number in range(count):
        scene = scenes[number % len(scenes)]
        share = rng.uniform(0.5, 1)
        width, height = (round(share * side) for side in scene.size)
        corners = zip(scene.size, (width, height), strict=True)
        left, top = (rng.integers(0, whole - part + 1) for whole, part in corners)
        cut = scene.crop((left, top, left + width, top + height))
        cut = cut.resize(size, Image.Resampling.BICUBIC)
        for copy in range(copies):
            path = folder / f"{copy:04}" / f"{number:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                os.link(folder / "0000" / path.name, path)
            else:
                cut.save(path, quality=90)
    return folder


def make_checkpoint(folder: Path, name: str, **arguments: Any) -> Path:
    """Write untrained weights; with ``arguments`` or another image size, also their recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    size = arguments.pop("img_size", None)
    model = backbones.create_model(name, **arguments)
    save_weights(folder / "a.safetensors", model.state_dict(), {"model": name})
    if size is not None:
        recipe = {"model": name, "model_args": arguments, "img_size": size, "data": "x"}
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "a.safetensors"


DIM, ROWS, QUERIES, TOP = 192, 1_000_000, 200, 10
_IN_SHARD = 50_000
# Embeddings of images are concentrated around few directions: see `vectors`.
_LATENT, _CENTRES, _SPREAD = 24, 20_000, 0.5


def vectors(count: int, seed: int) -> np.ndarray:
    """Synthetic embeddings (count, DIM): points around centres in 24 dimensions, mapped to DIM."""
    fixed, chance = np.random.default_rng(0), np.random.default_rng(seed)
    centres = fixed.standard_normal((_CENTRES, _LATENT), np.float32)
    to_dim = fixed.standard_normal((_LATENT, DIM), np.float32)
    points = centres[chance.integers(0, _CENTRES, count)]
    points = points + _SPREAD * chance.standard_normal((count, _LATENT), np.float32)
    return np.maximum(points @ to_dim, 0)  # as behind a ReLU


def make_table(folder: Path, rows: int) -> Path:
    """Write a table of synthetic embeddings."""
    starts = range(0, rows, _IN_SHARD)
    content = {
        **{"model": "synthetic", "weights": {"file": "", "path": "", "sha256": ""}},
        **{"preprocessing": {}, "features": "head", "shape": [DIM], "dim": DIM},
        **{"dtype": "float32", "computed": "float32", "classes": 0, "names": []},
        **{"source": {"kind": "folder", "path": str(folder)}, "images": rows},
        **{"shards": len(starts), "rows": _IN_SHARD, "versions": {}},
    }
    (folder / "shards").mkdir(parents=True)
    write_metadata(folder, content)
    for number, start in enumerate(starts):
        count = min(_IN_SHARD, rows - start)
        with ShardWriter(shard_path(folder, number), schema(DIM), identity(content)) as shard:
            keys = [f"{start + i:08}.jpg" for i in range(count)]
            shard.add(keys, [(375, 500)] * count, vectors(count, 1 + number))
    return folder


# -- embedding: measurements -----------------------------------------------------------------------


def rate_of_embed(photos: Path, checkpoint: Path, rows: int = 32, **options: Any) -> float:
    """Images per second, from the time when a quarter of the shards is written."""
    with tempfile.TemporaryDirectory() as place:
        embed(photos, Path(place) / "out", checkpoint=checkpoint, rows=rows, **options)
        times = sorted(p.stat().st_mtime_ns for p in Path(place).glob("out/shards/*.parquet"))
    begun = max(cores(), len(times) // 4)
    return rows * (len(times) - begun) / ((times[-1] - times[begun - 1]) * 1e-9)


def rate_of_script(photos: Path, name: str, checkpoint: Path) -> float:
    """Images per second of the usual script, from its second batch on.

    The features of the first batch are saved beside the weights, as ``features.npy``.
    """
    batch = min(64, len([*photos.rglob("*.jpg")]) // 4)
    given = name.removeprefix(PREFIX), checkpoint, photos, batch, cores()
    words = [sys.executable, "-c", _SCRIPT, *map(str, given), str(checkpoint.parent / "features")]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def least_cosine(photos: Path, checkpoint: Path, dtype: str) -> float:
    """Between embeddings of ``embed`` and the script's of the first images."""
    script = np.load(checkpoint.parent / "features.npy")
    with tempfile.TemporaryDirectory() as place:
        few = Path(place) / "few"
        few.mkdir()
        for path in sorted(photos.rglob("*.jpg"))[: len(script)]:
            os.link(path, few / path.name)
        embed(few, Path(place) / "out", checkpoint=checkpoint, dtype=dtype)
        _, ours = load(Path(place) / "out")
    return float((unit(ours) * unit(script)).sum(1).min())


def in_turns(rounds: int, *ways: Callable[[], float]) -> list[list[float]]:
    """Run the functions alternately, in both orders; return the figures of each, by round."""
    figures = []
    for number in range(rounds):
        order = range(len(ways))[:: 1 if number % 2 else -1]
        found = {place: ways[place]() for place in order}
        figures.append([found[place] for place in range(len(ways))])
    return [list(column) for column in zip(*figures, strict=True)]


def ratio(figures: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of adjacent turns."""
    return statistics.median(a / b for a, b in zip(figures, others, strict=True))


def _rows(count: int) -> int:
    """Of a shard: whole batches of 16, and shards enough for four copies of so many images."""
    return 32 if count >= 256 else 16


def measure_speed(
    folder: Path, rounds: int, models: Sequence[str], count: int
) -> Iterator[dict[str, Any]]:
    once, photos = (make_photos(folder / str(copies), copies, count=count) for copies in (1, 4))
    for name in models:
        checkpoint = make_checkpoint(folder / name, name)
        dtypes = ["float32", *(["bfloat16"] if policy.multiplies(torch.bfloat16) else [])]
        *ours, script = in_turns(
            rounds,
            *(
                partial(rate_of_embed, photos, checkpoint, _rows(count), dtype=dtype)
                for dtype in dtypes
            ),
            partial(rate_of_script, once, name, checkpoint),
        )
        dim = backbones.create_model(name).head_hidden_size
        result = {"part": "speed", "model": name, "dim": dim, "cores": cores()}
        for dtype, rates in zip(dtypes, ours, strict=True):
            row = {**result, "dtype": dtype, "embed": rates, "script": script}
            row |= {"ratio": ratio(rates, script), "cosine": least_cosine(once, checkpoint, dtype)}
            yield row


def measure_ray(folder: Path, rounds: int, models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """With the first, fastest model, and shards of 128 images: a task of Ray is a shard."""
    photos = make_photos(folder / "photos", copies=8)
    name = models[0]
    checkpoint = make_checkpoint(folder / name, name)
    local, ray = in_turns(
        rounds,
        lambda: rate_of_embed(photos, checkpoint, rows=128),
        lambda: rate_of_embed(photos, checkpoint, rows=128, engine="ray"),
    )
    row = {"part": "ray", "model": name, "local": local, "ray": ray}
    yield {**row, "overhead": ratio(local, ray) - 1}


def rate_of_pipeline(
    package: str, python: str, name: str, few: tuple[Path, int], many: tuple[Path, int]
) -> float:
    """Images per second: by how much longer many images take than few, without the start.

    Raises:
        RuntimeError: it does not run; the message is the end of what it wrote.
    """
    seconds = []
    for photos, _ in (few, many):
        with tempfile.TemporaryDirectory() as place:
            program = Path(place) / "program.py"
            program.write_text(CONTENDERS["embed"][package])
            words = [python, str(program), name, str(photos), str(cores())]
            done = subprocess.run(words, cwd=place, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{package} does not run for {name}: {done.stderr.strip()[-2000:]}")
        # Progress may surround it.
        seconds.append(float(re.findall(r"took ([\d.]+) s", done.stdout)[-1]))
    return (many[1] - few[1]) / (seconds[1] - seconds[0])


def measure_pipelines(
    folder: Path, rounds: int, models: Sequence[str], count: int, pythons: dict[str, str]
) -> Iterator[dict[str, Any]]:
    photos = {n: make_photos(folder / str(n), copies=n, count=count) for n in (1, 2, 4)}
    few, many = ((photos[copies], copies * count) for copies in (1, 2))
    wanted = [(package, name) for package in pythons if pythons[package] for name in models]
    for package, name in wanted:
        checkpoint = make_checkpoint(folder / name, name)
        ours, theirs = in_turns(
            rounds,
            lambda checkpoint=checkpoint: rate_of_embed(photos[4], checkpoint, _rows(count)),
            lambda package=package, name=name: rate_of_pipeline(
                package, pythons[package], name.removeprefix(PREFIX), few, many
            ),
        )
        result = {"part": "pipelines", "model": f"{package}, {name}", "embed": ours}
        yield {**result, "theirs": theirs, "ratio": ratio(ours, theirs)}


def measure_memory(folder: Path, rounds: int, models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Resident memory of one process over 100 000 rows, with small images and a small model."""
    photos = make_photos(folder / "small", copies=200, size=(64, 48), count=500)
    small = {"dims": [16, 24, 32], "depths": [1, 1, 1], "attn_dims": [0, 8, 8]}
    checkpoint = make_checkpoint(folder / "tiny", "shvit_s1", img_size=32, **small)
    out, seen = folder / "out", []

    def watch() -> None:
        while not stop.wait(0.5):
            shards = len(list(out.glob("shards/part-*")))
            fields = Path("/proc/self/statm").read_text().split()
            seen.append((shards * 1000, int(fields[1]) * os.sysconf("SC_PAGESIZE") / 2**20))

    stop = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        done = embed(photos, out, checkpoint=checkpoint, rows=1000, workers=1)
    finally:
        stop.set()
        thread.join()
    at = {share: max(m for rows, m in seen if rows <= share * done.rows) for share in (0.1, 0.5, 1)}
    yield {
        "part": "memory",
        "model": "shvit_s1, shallow",
        "rows": done.rows,
        "seconds": round(done.seconds, 1),
        "mib": {f"{share:.0%}": round(peak) for share, peak in at.items()},
    }


def measure_decoding(folder: Path, rounds: int, models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """CPU milliseconds per image of decoders and the later steps, and whether results are equal."""
    files = [p.read_bytes() for p in sorted(make_photos(folder / "d", 1, count=64).rglob("*.jpg"))]
    config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.9}
    config |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_mode": "center"}
    images = Images(config)
    transforms = [
        create_transform(**config, is_training=False, use_prefetcher=fast) for fast in (True, False)
    ]
    decoded = [open_image(io.BytesIO(data)) for data in files]
    pixels = [np.asarray(image) for image in decoded]
    cropped = [images.resize(array) for array in pixels]
    size, decoder = 16, installed_decoder()
    batch = images.normalise(cropped[:size])
    network = Network(MODELS[0], make_checkpoint(folder / "network", MODELS[0]), "head", 0)
    network.prepare("float32", torch.device("cpu"))
    for _ in range(3):
        network(batch)
    ways: dict[str, Callable[[int], Any]] = {
        "embed's decoding": lambda i: open_pixels(io.BytesIO(files[i]), "RGB", decoder),
        "Pillow": lambda i: open_image(io.BytesIO(files[i])),
        **{name: lambda i, f=f: f(files[i]) for name, f in _decoders().items()},
        "embed's resizing and cropping": lambda i: images.resize(pixels[i]),
        "timm's resizing and cropping": lambda i: transforms[0](decoded[i]),
        "timm's resizing, cropping, normalising": lambda i: transforms[1](decoded[i]),
        "embed's normalising": lambda i: i % size or images.normalise(cropped[i : i + size]),
        f"{MODELS[0]}'s network": lambda i: i % size or network(batch),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            for number in range(min(len(files), size)):  # caches are as the last one left them
                way(number)
            begun = time.process_time()
            for number in range(len(files)):
                way(number)
            taken[name].append(1000 * (time.process_time() - begun) / len(files))
    # What each is compared with; the others have nothing to equal.
    wanted = dict.fromkeys(("embed's decoding", "Pillow", *_decoders()), pixels)
    wanted["embed's resizing and cropping"] = [np.asarray(transforms[0](d)) for d in decoded]
    for name, way in ways.items():
        same = None
        if name in wanted:
            same = all(np.array_equal(way(i), wanted[name][i]) for i in range(len(files)))
        result = {"part": "decoding", "model": name, "ms": statistics.median(taken[name])}
        yield {**result, "same": same}


def _decoders() -> dict[str, Callable[[bytes], Any]]:
    """The installed JPEG decoders."""
    found: dict[str, Callable[[bytes], Any]] = {"torchvision.io.decode_jpeg": _by_torchvision}
    with suppress(ImportError):
        import simplejpeg

        found["simplejpeg"] = simplejpeg.decode_jpeg
    with suppress(ImportError, OSError):
        import pyvips

        found["pyvips"] = lambda data: pyvips.Image.new_from_buffer(data, "").numpy()
    return found


def _by_torchvision(data: bytes) -> Any:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0)


def measure_index(folder: Path, rounds: int, models: Sequence[str]) -> Iterator[dict[str, Any]]:
    """CPU seconds to build, open and query, and how many of the true matches the graph finds."""
    table = make_table(folder / "table", ROWS)
    queries = vectors(QUERIES, 10**6)
    wanted, exact = _searched(table, queries, "exact")
    _, build = _cpu_seconds(lambda: open_graph(table))
    graph, opening = _cpu_seconds(lambda: open_graph(table))
    _, inside = _cpu_seconds(lambda: graph.search(unit(queries), TOP))
    found, by_graph = _searched(table, queries, "hnsw")
    shared = [len(a & b) / len(a) for a, b in zip(wanted, found, strict=True)]
    yield {
        **{"part": "index", "model": "synthetic", "rows": ROWS, "dim": DIM, "queries": QUERIES},
        **{"build": build, "open": opening, "graph_query_ms": 1000 * inside / QUERIES},
        **{"exact": exact, "hnsw": by_graph, "recall": float(np.mean(shared))},
        "bytes": sum(p.stat().st_size for p in table.glob("hnsw-*")),
    }


def _cpu_seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.process_time()
    return run(), time.process_time() - begun


def _searched(table: Path, queries: np.ndarray, index: str) -> tuple[list[set[int]], list[float]]:
    """The rows found for each query, and the CPU seconds of a call for one query and for all."""
    _, one = _cpu_seconds(lambda: search(table, queries[:1], TOP, index))
    found, every = _cpu_seconds(lambda: search(table, queries, TOP, index))
    return [{match.row for match in row} for row in found], [one, every]


# Parts whose results for other models are kept.
_BY_MODEL = ("speed", "pipelines")
PARTS = {
    "ray": measure_ray,
    "memory": measure_memory,
    "decoding": measure_decoding,
    "index": measure_index,
}


def embedding(arguments: Sequence[str]) -> None:
    """`vision-backbones embed` beside the usual hand-written script, other packages, and its parts.

    The script runs timm's model in float32 behind a DataLoader with one process per core. Both
    embed the same JPEGs of 500×375 pixels, alternately, on the same cores: the script once, and
    `embed`, which is faster, several times over. Startup is excluded.
    """
    parser = Parser(prog="benchmark.py --op embed", description=embedding.__doc__)
    add = parser.add_argument
    add("parts", nargs="+", choices=[*_BY_MODEL, *PARTS], help="what to measure again")
    add("--models", nargs="+", default=MODELS, metavar="NAME")
    add("--rounds", type=whole(1), default=3, help="number of runs, whose medians are reported")
    add("--images", type=whole(32), default=IMAGES, help="of `speed` and `pipelines`; default 512")
    packages = list(CONTENDERS["embed"])
    for package in packages:
        text = "Python of an environment that has it, for `pipelines`"
        add(f"--{package}", metavar="PYTHON", help=text)
    args = parsed(parser, arguments, REPORTS / "embed.json")
    pythons = {name: getattr(args, name.replace("-", "_")) for name in packages}
    measure: dict[str, Any] = {
        **PARTS,
        "speed": partial(measure_speed, count=args.images),
        "pipelines": partial(measure_pipelines, count=args.images, pythons=pythons),
    }
    if "pipelines" in args.parts and not any(pythons.values()):
        parser.error(f"pipelines needs a PYTHON for one of {', '.join(packages)}")
    report = load_report(args.output, {**machine(torch.device("cpu")), "threads": cores()})
    for part in args.parts:
        if part not in _BY_MODEL:
            report["results"] = [r for r in report["results"] if r["part"] != part]
        with tempfile.TemporaryDirectory(prefix="embed-") as folder:
            for result in measure[part](Path(folder), args.rounds, args.models):
                result.setdefault("dtype", "float32")
                put_rows(report, [result], ("part", "model", "dtype"))
                write_report(args.output, report)


# -- training --------------------------------------------------------------------------------------

LOADER_AIM, STEP_AIM = 0.90, 1.05
CONFIG = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
}


def our_loader(recipe: Recipe, folder: Path, world: World) -> TrainLoader:
    """train_cls.py's."""
    splits = open_splits(recipe)
    corrupt = CorruptImages(folder / "corrupt.txt", 0.0)
    return TrainLoader(splits.train, splits.train_size, CONFIG, recipe, world, corrupt)


def timms_loader(recipe: Recipe, folder: Path, world: World) -> Any:
    """timm's, for the same recipe."""
    dataset = create_dataset("", root=str(folder), split="train", is_training=True)
    return create_loader(
        dataset,
        input_size=CONFIG["input_size"],
        batch_size=recipe.batch_size,
        is_training=True,
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.aa,
        interpolation=recipe.train_interpolation,
        mean=CONFIG["mean"],
        std=CONFIG["std"],
        num_workers=recipe.workers,
        pin_memory=recipe.pin_memory and world.device.type == "cuda",
        device=world.device,
        persistent_workers=recipe.workers > 0,
    )


def read_all(batches: Iterator[Any]) -> float:
    """Seconds to read an epoch; the synthetic model computes the mean."""
    begun = time.perf_counter()
    for images, _ in batches:
        images.mean().item()
    return time.perf_counter() - begun


def compare_loaders(options: Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Measure both loaders alternately."""
    for split, count in (("train", options.images // 2), ("validation", 1)):
        make_photos(folder / split, copies=2, count=count)  # a class each
    given = {key: getattr(options, key) for key in ("batch_size", "workers", "aa")}
    recipe = Recipe(data=str(folder), train_interpolation="bicubic", **given)
    ours, timms = our_loader(recipe, folder, world), timms_loader(recipe, folder, world)
    read_all(ours.epoch(0))  # start processes, fill the file cache
    read_all(iter(timms))
    epochs = itertools.count(1)
    of_ours, of_timms = in_turns(
        options.turns,
        lambda: read_all(ours.epoch(next(epochs))),
        lambda: read_all(iter(timms)),
    )
    ours.close()
    images, found = ours.batches * options.batch_size, ratio(of_timms, of_ours)
    return {
        **given,
        "images": images,
        "ours_images_per_second": images / statistics.median(of_ours),
        "timm_images_per_second": images / statistics.median(of_timms),
        "ratio": found,
        "aim": f"ratio >= {LOADER_AIM}",
        "met": found >= LOADER_AIM,
    }


def compare_steps(options: Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Measure both steps alternately, each with its own copy of the network."""
    recipe = Recipe(
        model=options.model,
        data="digits",
        img_size=options.step_size,
        batch_size=options.step_batch_size,
        workers=0,
        drop_path=0.0,
        smoothing=0.0,
        sched="constant",
        warmup_epochs=0.0,
        lr=1e-3,
    )
    progress = Progress(world, io.StringIO())
    sys.path.insert(0, str(ROOT))
    import train_cls  # a script beside the packages, which no installation has

    trainer = train_cls.Trainer(recipe, folder, world, StopRequest(), progress)
    images = torch.randn(options.step_batch_size, 3, options.step_size, options.step_size)
    images, labels = images.to(world.device), torch.arange(len(images)) % 10
    labels = labels.to(world.device)
    # An epoch of the real loop, with precomputed batches.
    trainer.batches = lambda: itertools.repeat((images, labels))  # type: ignore[method-assign]
    trainer.updates_per_epoch = options.steps

    network = build.build_model(recipe, 10).to(world.device).train()
    optimizer = optimization.build_optimizer(recipe, network, 1e-3)
    criterion = nn.CrossEntropyLoss()

    def ours() -> None:
        trainer.step = 0
        trainer.train_epoch()

    def bare() -> None:
        network.train()
        for _ in range(options.steps):
            loss: Tensor = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def seconds(loop: Callable[[], None]) -> float:
        begun = time.perf_counter()
        loop()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    for loop in (ours, bare):
        seconds(loop)
    spent = in_turns(options.turns * 4, partial(seconds, ours), partial(seconds, bare))
    trainer.close()
    found = ratio(*spent)
    ours_ms, bare_ms = (1e3 * statistics.median(times) / options.steps for times in spent)
    return {
        "model": options.model,
        "img_size": options.step_size,
        "batch_size": options.step_batch_size,
        **{"ours_ms": ours_ms, "bare_ms": bare_ms, "ratio": found},
        "aim": f"ratio <= {STEP_AIM}",
        "met": found <= STEP_AIM,
    }


def training(arguments: Sequence[str]) -> int:
    """The overhead of the training code: data loader and training step; 1 if an aim is missed.

    Loader: images per second of train_cls.py's loader and of timm's create_loader, same JPEG files,
    same transforms, same number of processes, with a synthetic model that only reads its input.
    Step: a step of train_cls.py (including checks for signals, non-finite losses and time to save,
    metrics and schedule) and a minimal loop in PyTorch, with the same network, batch and optimizer.
    The aims are 90 % of timm's rate and at most 5 % more time than the minimal loop, as medians of
    the ratios of adjacent turns.
    """
    parser = Parser(prog="benchmark.py --op training", description=training.__doc__)
    add = parser.add_argument
    add("--images", type=whole(1), default=512, help="JPEG files of 500×375")
    add("--batch-size", type=whole(1), default=32, help="loaders' batch size")
    add("--workers", type=whole(0), default=1, help="loader processes")
    add("--aa", help="such as rand-m9-mstd0.5-inc1")
    add("--model", default="shvit_s1", help="batch size of the step")
    add("--step-size", type=whole(1), default=64, help="image size of the step")
    add("--step-batch-size", type=whole(1), default=32)
    add("--steps", type=whole(1), default=4, help="steps per turn")
    add("--turns", type=whole(1), default=7)
    add("--threads", type=whole(1), default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parsed(parser, arguments, Path("runs/training.json"))
    torch.set_num_threads(options.threads)
    world = World(0, 1, torch.device(options.device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run").mkdir()
        report: dict[str, Any] = {
            "machine": machine(world.device),
            "loader": compare_loaders(options, world, folder / "images"),
            "step": compare_steps(options, world, folder / "run"),
        }
    for part in ("loader", "step"):
        figures = {k: round(v, 3) if isinstance(v, float) else v for k, v in report[part].items()}
        logger.info("%s: %s", part, figures)
    write_report(options.output, report)
    return 0 if report["loader"]["met"] and report["step"]["met"] else 1


# -- the first image -------------------------------------------------------------------------------

# Whether the process has a compiler.
WAYS = {"wheel": False, "source": True, "no-compiler": False, "before": True}
_FIRST_IMAGE = """
import json, os, sys, time
import torch
import backbones
torch.set_num_threads(1)
name, form = sys.argv[1:]
model = backbones.create_model(name).eval().to(memory_format=torch.channels_last)
side = model.pretrained_cfg["input_size"][1:]
image = torch.randn(1, 3, *side).to(memory_format=torch.channels_last)
def cpu(): return sum(os.times()[:4])  # of this process and its finished children (compilers)
start = time.perf_counter(), cpu()
with torch.inference_mode():
    (backbones.fuse(model) if form == "fused" else model)(image)
print(json.dumps([time.perf_counter() - start[0], cpu() - start[1]]))
"""


def first_image(
    model: str, form: str, python: str, tree: Path | None, compiler: bool
) -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "VISION_BACKBONES_CACHE_DIR": empty, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        environment.pop("CXX", None)
        if tree is not None:
            environment["PYTHONPATH"] = str(tree)
        if not compiler:
            environment["PATH"] = empty
        hidden = "" if compiler else "import sys; sys.modules['ziglang'] = None\n"
        words = [python, "-c", hidden + _FIRST_IMAGE, model, form]
        done = subprocess.run(
            words, cwd=empty, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    passed, cpu = json.loads(done.stdout.splitlines()[-1])
    return passed, cpu


def measure_start(
    way: str, models: Sequence[str], python: str, tree: Path | None, rounds: int
) -> list[dict[str, Any]]:
    """A result for each model."""
    results = []
    for model in models:
        result: dict[str, Any] = {"way": way, "model": model, "rounds": rounds}
        for form in ("plain", "fused"):
            runs = [first_image(model, form, python, tree, WAYS[way]) for _ in range(rounds)]
            passed, cpu = (statistics.median(times) for times in zip(*runs, strict=True))
            result[form] = {"seconds": round(passed, 3), "cpu_seconds": round(cpu, 3)}
        results.append(result)
    return results


def cold_start(arguments: Sequence[str]) -> None:
    """How long the first image takes in a new process with one thread and an empty kernel cache.

    Imports and the creation of the model are excluded; folding is included. `wheel` takes --python
    of an environment that has only the wheel, and `before` --tree of an older checkout.
    """
    parser = Parser(prog="benchmark.py --op cold_start", description=cold_start.__doc__)
    add = parser.add_argument
    add("way", choices=list(WAYS), help="what to measure again")
    add("--models", nargs="+", default=("shvit_s4", "van_b0", "medvitv2_tiny"), metavar="NAME")
    add("--python", default=sys.executable, help="the interpreter to run")
    text = "checkout to import; default: this one (none for wheel)"
    add("--tree", type=nonempty_path, help=text)
    add("--rounds", type=whole(1), default=1, help="processes to take the median over")
    args = parsed(parser, arguments, REPORTS / "cold_start.json")
    report = load_report(args.output, {**machine(torch.device("cpu")), "threads": 1})
    tree = args.tree or (None if args.way == "wheel" else ROOT)
    rows = measure_start(args.way, args.models, args.python, tree, args.rounds)
    put_rows(report, rows, ("way", "model"))
    write_report(args.output, report)
