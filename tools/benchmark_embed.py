"""`embed` for ``benchmark.py --op embed``: beside other programs, and part by part."""

from __future__ import annotations

import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from benchmark_programs import IMAGES, REPORTS, in_turns, make_photos
from contenders import CONTENDERS
from timm.data import create_transform
from torchvision.io import decode_jpeg

import backbones
from backbones.cli.reports import load_report, parsed, put_rows, write_report
from backbones.cli.timing import machine, ratio
from backbones.common.arguments import whole
from backbones.common.console import Parser
from backbones.common.files import save_weights
from backbones.common.images import installed_decoder, open_image, open_pixels
from backbones.common.resizing import Resizing
from backbones.core.registry import PREFIX
from backbones.embedding import embed
from backbones.embedding.network import Network
from backbones.embedding.table import load, unit
from ops.cpu import policy
from ops.cpu.build.libraries import cores

# -- images and weights ----------------------------------------------------------------------------

MODELS = ("shvit_s1", "van_b0", "unireplknet_a")
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
model.load_state_dict(load_file(checkpoint)) if checkpoint else None
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


# -- measurements ----------------------------------------------------------------------------------


def rate_of_embed(photos: Path, checkpoint: Path, rows: int = 32, **options: Any) -> float:
    """Images per second, from the time when a quarter of the shards is written."""
    with tempfile.TemporaryDirectory() as place:
        embed(photos, Path(place) / "out", checkpoint=checkpoint, rows=rows, **options)
        times = sorted(p.stat().st_mtime_ns for p in Path(place).glob("out/shards/*.parquet"))
    begun = max(cores(), len(times) // 4)
    return rows * (len(times) - begun) / ((times[-1] - times[begun - 1]) * 1e-9)


def rate_of_script(photos: Path, name: str, checkpoint: Path) -> float:
    """Images per second of the usual script, from its second batch on.

    The features of the first batch are saved beside the weights, as ``features.npy``; they are of
    these weights if the model is called timm's, whose names they have.
    """
    batch = min(64, len([*photos.rglob("*.jpg")]) // 4)
    weights = checkpoint if name.startswith(PREFIX) else ""
    given = name.removeprefix(PREFIX), weights, photos, batch, cores()
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
            row["ratio"] = ratio(rates, script)
            if name.startswith(PREFIX):
                row["cosine"] = least_cosine(once, checkpoint, dtype)
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
        while not stop.is_set():
            shards = len(list(out.glob("shards/part-*")))
            fields = Path("/proc/self/statm").read_text().split()
            seen.append((shards * 1000, int(fields[1]) * os.sysconf("SC_PAGESIZE") / 2**20))
            stop.wait(0.5)

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
    resize = Resizing(config)
    transforms = [
        create_transform(**config, is_training=False, use_prefetcher=fast) for fast in (True, False)
    ]
    decoded = [open_image(io.BytesIO(data)) for data in files]
    pixels = [np.asarray(image) for image in decoded]
    cropped = [resize(array) for array in pixels]
    size, decoder = 16, installed_decoder()

    def normalise(i: int) -> Any:
        return resize.normalise(np.stack(cropped[i : i + size]))

    batch = normalise(0)
    network = Network(MODELS[0], make_checkpoint(folder / "network", MODELS[0]), "head", 0)
    network.prepare("float32", torch.device("cpu"), size)
    ways: dict[str, Callable[[int], Any]] = {
        "embed's decoding": lambda i: open_pixels(io.BytesIO(files[i]), "RGB", decoder),
        "Pillow": lambda i: open_image(io.BytesIO(files[i])),
        **{name: lambda i, f=f: f(files[i]) for name, f in _decoders().items()},
        "embed's resizing and cropping": lambda i: resize(pixels[i]),
        "timm's resizing and cropping": lambda i: transforms[0](decoded[i]),
        "timm's resizing, cropping, normalising": lambda i: transforms[1](decoded[i]),
        "embed's normalising": lambda i: i % size or normalise(i),
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


# Parts whose results for other models are kept.
_BY_MODEL = ("speed", "pipelines")
PARTS = {
    "ray": measure_ray,
    "memory": measure_memory,
    "decoding": measure_decoding,
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
