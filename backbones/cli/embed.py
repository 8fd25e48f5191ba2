"""``vision-backbones embed``: write the features of many images to a folder of Parquet shards.

It handles any number of images. After an interruption, the same command resumes.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from backbones.common.arguments import FILE, nonempty, nonempty_path, whole
from backbones.common.dtypes import DTYPES
from backbones.common.messages import one_line
from backbones.common.signals import exit_on_signals
from backbones.embedding.network import FEATURES
from backbones.embedding.run import ENGINES, embed
from backbones.embedding.table import CORRUPT, STORED

EXAMPLE = "photos/ --model van_b0 --checkpoint van_b0.pth --out features/"

_SHOWN = 5


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    text = "folder of images, .tar or .parquet files, one such file or a pattern of them, list of "
    text += "paths (.txt), digits, medmnist/NAME, torch/NAME, hfds/NAME"
    add("source", type=nonempty, metavar="SOURCE", help=text)
    add("--model", help="model name; optional for checkpoints of train_cls.py")
    add("--checkpoint", **FILE, help="weights")
    text = "a new folder, or one to resume"
    add("--out", type=nonempty_path, metavar="FOLDER", required=True, help=text)
    add("--features", default="head", metavar="WHICH", help=f"{FEATURES} (head)")
    text = "also store the N most likely classes (0)"
    add("--classes", type=whole(0), default=0, metavar="N", help=text)
    add("--dtype", default="float32", choices=DTYPES, help="dtype of the computation (float32)")
    add("--store", default="float32", choices=STORED, help="dtype in the shards (float32)")
    add("--split", default="train", help="split of digits, medmnist/, torch/ or hfds/ (train)")
    add("--column", metavar="NAME", help="image column of Parquet files and hfds/")
    add("--rows", type=whole(1), default=1024, metavar="N", help="images per shard (1024)")
    add("--batch-size", type=whole(1), metavar="N", help="images per batch (16; on a GPU 256)")
    add("--workers", type=whole(1, 1024), metavar="N", help="processes (one per core or GPU)")
    add("--decoders", type=whole(0, 1024), metavar="N", help="decoding threads per process")
    add("--device", default="cpu", help="cpu, cuda (all GPUs), cuda:1, … (cpu)")
    add("--engine", default="local", choices=ENGINES, help="this machine, or a Ray cluster (local)")
    add("--address", help="Ray cluster: auto or HOST:PORT (default: start one here)")


@exit_on_signals()
def run(options: Namespace) -> int:
    """Run ``embed``; 1 if an image could not be decoded."""
    done = embed(**vars(options), progress=sys.stderr)
    rate = f", {done.done / done.seconds:.0f} images/s" if done.done else ""
    sys.stdout.write(f"{done.rows} embeddings in {options.out}{rate}\n")
    if done.skipped:
        sys.stderr.write(f"{done.skipped}\n")
    for key, reason in done.corrupt[:_SHOWN]:
        sys.stderr.write(f"cannot read {one_line(key)}: {reason}\n")
    if done.corrupt:
        count = len(done.corrupt)
        sys.stderr.write(f"{count} images are corrupt, see {options.out / CORRUPT}\n")
    return 1 if done.corrupt else 0
