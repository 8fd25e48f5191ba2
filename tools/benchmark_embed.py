"""Compare `vision-backbones embed` with the usual hand-written script, and write its page.

    python tools/benchmark_embed.py speed ray memory decoding
    python tools/benchmark_embed.py index        # minutes
    python tools/benchmark_embed.py pipelines    # see embed_pipelines.py
    python tools/benchmark_embed.py              # only the page, from existing measurements

The script runs timm's model in float32 behind a ``DataLoader`` with one process per core. Both
embed the same 512 JPEGs of 500×375 pixels, alternately, on the same cores: the script once, and
``embed``, which is faster, several times over. Startup is excluded. Writes
``docs/performance/embed.json`` and ``docs/performance-embed.md``, after each model of each part.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from embed_index import measure_index
from embed_page import page
from embed_pipelines import PIPELINES, rate_of_pipeline
from measuring import GENERATED, load_report, machine, read_report, replace_results, write
from PIL import Image
from timm.data import create_transform

import backbones
from backbones.common.arguments import nonempty_path
from backbones.common.files import save_weights
from backbones.common.images import installed_decoder, open_image, open_pixels
from backbones.common.outputs import REPORT, add_overwrite, require_writable
from backbones.embedding import embed
from backbones.embedding.local import cores
from backbones.embedding.network import Network
from backbones.embedding.worker import Images
from backbones.restoration.photographs import TRAINING, VALIDATION, find_photographs
from ops.cpu import policy

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "performance" / "embed.json"
PAGE = ROOT / "docs" / "performance-embed.md"
MODELS = ("shvit_s1", "van_b0", "unireplknet_a")
IMAGES, SIZE = 512, (500, 375)
_SCRIPT = """
import json, sys, time
import timm, torch
import backbones  # registers what timm lacks
from pathlib import Path
from PIL import Image
from torch.utils.data import DataLoader, Dataset
name, checkpoint, folder, processes = sys.argv[1:]
model = timm.create_model(name).eval()
model.load_state_dict(torch.load(checkpoint)) if checkpoint else None
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
class Photos(Dataset):
    def __init__(self): self.paths = sorted(Path(folder).rglob("*.jpg"))
    def __len__(self): return len(self.paths)
    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image: return transform(image.convert("RGB"))
done, begun = 0, None
with torch.inference_mode():
    for images in DataLoader(Photos(), batch_size=64, num_workers=int(processes)):
        model.forward_head(model.forward_features(images), pre_logits=True).numpy()
        if begun is None: begun = time.perf_counter()
        else: done += len(images)
print(json.dumps(done / (time.perf_counter() - begun)))
"""


# -- images and weights ----------------------------------------------------------------------------


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
        left, top = (
            rng.integers(0, scene.width - width + 1),
            rng.integers(0, scene.height - height + 1),
        )
        cut = scene.crop((left, top, left + width, top + height)).resize(
            size, Image.Resampling.BICUBIC
        )
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


# -- measuring -------------------------------------------------------------------------------------


def rate_of_embed(photos: Path, checkpoint: Path, rows: int = 32, **options: Any) -> float:
    """Images per second, from the time when a quarter of the shards is written."""
    with tempfile.TemporaryDirectory() as place:
        embed(photos, Path(place) / "out", checkpoint=checkpoint, rows=rows, **options)
        times = sorted(p.stat().st_mtime_ns for p in Path(place).glob("out/shards/*.parquet"))
    begun = max(cores(), len(times) // 4)
    return rows * (len(times) - begun) / ((times[-1] - times[begun - 1]) * 1e-9)


def rate_of_script(photos: Path, name: str) -> float:
    """Images per second of the usual script, from its second batch on."""
    words = [sys.executable, "-c", _SCRIPT, name, "", str(photos), str(cores())]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def in_turns(rounds: int, *ways: Callable[[], float]) -> list[list[float]]:
    """Run the functions alternately; return the figures of each, by round."""
    figures = [[way() for way in ways] for _ in range(rounds)]
    return [list(column) for column in zip(*figures, strict=True)]


def measure_speed(folder: Path, rounds: int, models: Sequence[str]) -> Iterator[dict[str, Any]]:
    once, photos = (make_photos(folder / str(copies), copies=copies) for copies in (1, 4))
    for name in models:
        checkpoint = make_checkpoint(folder / name, name)
        dtypes = ["float32", *(["bfloat16"] if policy.multiplies(torch.bfloat16) else [])]
        *ours, script = in_turns(
            rounds,
            *(partial(rate_of_embed, photos, checkpoint, dtype=dtype) for dtype in dtypes),
            partial(rate_of_script, once, name),
        )
        dim = backbones.create_model(name).head_hidden_size
        result = {"part": "speed", "model": name, "dim": dim, "cores": cores()}
        for dtype, rates in zip(dtypes, ours, strict=True):
            ratio = statistics.median(a / b for a, b in zip(rates, script, strict=True))
            yield {**result, "dtype": dtype, "embed": rates, "script": script, "ratio": ratio}


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
    overhead = statistics.median(a / b for a, b in zip(local, ray, strict=True)) - 1
    yield {"part": "ray", "model": name, "local": local, "ray": ray, "overhead": overhead}


def measure_pipelines(
    folder: Path, rounds: int, models: Sequence[str], pythons: dict[str, str]
) -> Iterator[dict[str, Any]]:
    photos = {copies: make_photos(folder / str(copies), copies=copies) for copies in (1, 2, 4)}
    few, many = ((photos[copies], copies * IMAGES) for copies in (1, 2))
    wanted = [(package, name) for package in pythons if pythons[package] for name in models]
    for package, name in wanted:
        checkpoint = make_checkpoint(folder / name, name)
        ours, theirs = in_turns(
            rounds,
            lambda checkpoint=checkpoint: rate_of_embed(photos[4], checkpoint),
            lambda package=package, name=name: rate_of_pipeline(
                package, pythons[package], name, few, many, cores()
            ),
        )
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        result = {"part": "pipelines", "model": f"{package}, {name}", "embed": ours}
        yield {**result, "theirs": theirs, "ratio": ratio}


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
    (network, batch), size = _network(folder, images.normalise(cropped[:16])), 16
    decoder = installed_decoder()
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
            for number in range(
                min(len(files), size)
            ):  # caches and memory as the last one left them
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


def _network(folder: Path, batch: Any) -> tuple[Callable[[Any], Any], Any]:
    """The fastest model as embed runs it, warmed up."""
    checkpoint = make_checkpoint(folder / "network", MODELS[0])
    network = Network(MODELS[0], checkpoint, "head", 0)
    network.prepare("float32", torch.device("cpu"))
    for _ in range(3):
        network(batch)
    return network, batch


def _decoders() -> dict[str, Callable[[bytes], Any]]:
    """The installed JPEG decoders."""
    found: dict[str, Callable[[bytes], Any]] = {}
    from torchvision.io import decode_jpeg

    def by_torchvision(data: bytes) -> Any:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0)

    found["torchvision.io.decode_jpeg"] = by_torchvision
    try:
        import simplejpeg

        found["simplejpeg"] = simplejpeg.decode_jpeg
    except ImportError:
        pass
    try:
        import pyvips

        found["pyvips"] = lambda data: pyvips.Image.new_from_buffer(data, "").numpy()
    except (ImportError, OSError):
        pass
    return found


# Parts whose results for other models are kept.
_BY_MODEL = ("speed", "pipelines")
PARTS = {
    "speed": measure_speed,
    "ray": measure_ray,
    "memory": measure_memory,
    "decoding": measure_decoding,
    "index": measure_index,
}


# -- the command line -----------------------------------------------------------------------------


@contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="embed-") as place:
        yield Path(place)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = [[], *PARTS, "pipelines"]
    parser.add_argument("parts", nargs="*", choices=parts, help="what to measure anew")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians count")
    parser.add_argument("--output", type=nonempty_path, default=OUTPUT)
    parser.add_argument("--page", type=nonempty_path, default=PAGE)
    text = "Python of an environment that has it, for `pipelines`"
    parser.add_argument("--birder", metavar="PYTHON", help=text)
    parser.add_argument("--clip-retrieval", metavar="PYTHON", help=text)
    add_overwrite(parser)
    args = parser.parse_args(arguments)
    written = {"--output": (args.output, REPORT), "--page": (args.page, GENERATED)}
    require_writable(written, overwrite=args.overwrite, makes_folders=True)
    pythons = {name: getattr(args, name.replace("-", "_")) for name in PIPELINES}
    measure: dict[str, Any] = {**PARTS, "pipelines": partial(measure_pipelines, pythons=pythons)}
    if "pipelines" in args.parts and not any(pythons.values()):
        parser.error("pipelines needs --birder PYTHON or --clip-retrieval PYTHON")
    here = {**machine(torch.device("cpu")), "threads": cores()}
    report = load_report(args.output, here) if args.parts else read_report(args.output)
    for part in args.parts:
        if part not in _BY_MODEL:
            report["results"] = [r for r in report["results"] if r["part"] != part]
        with _place() as folder:
            for result in measure[part](folder, args.rounds, args.models):
                result.setdefault("dtype", "float32")
                replace_results(args.output, report, [result], ("part", "model", "dtype"))
    write(args.page, lambda path: path.write_text(page(report), encoding="utf-8"))


if __name__ == "__main__":
    main()
