"""The model of ``upscale`` and ``sr.py validate``, from their command lines."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from torch import nn

import backbones
from backbones.common.arguments import FILE, THREADS, usable_device
from backbones.common.dtypes import COMPUTED, check_dtype
from backbones.common.errors import CommandError, DataError
from backbones.common.keys import parse_yaml
from backbones.common.messages import shown
from backbones.core.loaded import create
from backbones.core.outlines import outlines

_DTYPES = ("float32", "bfloat16", "int8", "auto")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model."""
    add = parser.add_argument
    add("--model", required=True, help="one of backbones.list_models('hat*')")
    add("--checkpoint", **FILE, help="its weights")
    text = "further keywords, such as '{upscale: 1}'"
    add("--model-args", default="{}", metavar="YAML", help=text)
    add("--max-memory", metavar="SIZE", help="such as 2G or 800M (default: half of what is free)")
    add("--tta", action="store_true", help="average over 8 flips and rotations")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--dtype", choices=_DTYPES, help="dtype on a CPU, instead of --amp (float32)")
    add("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    add("--threads", type=THREADS, help="CPU threads")


def restorer_of(options: argparse.Namespace) -> tuple[nn.Module, int | None]:
    """The model of the options, on its device, and the memory limit in bytes, if given.

    On a CPU it is fused, except with autocast, since fused layers have a single dtype. Sets
    PyTorch's number of threads if given.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    memory = None if options.max_memory is None else parse_size(options.max_memory)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(default if options.device is None else options.device)
    if options.dtype is not None:
        if options.amp or device.type != "cpu":
            raise CommandError("--dtype is for CPUs, without --amp; on GPUs use --amp")
        options.dtype = check_dtype(options.dtype, device)
    model = load_restorer(options.model, options.checkpoint, options.model_args).to(device)
    if device.type == "cpu" and not options.amp:
        backbones.fuse(model, None if options.dtype is None else COMPUTED[options.dtype])
    return model, memory


def load_restorer(name: str, checkpoint: str | Path | None, arguments: str = "{}") -> nn.Module:
    """A restoration model with its weights; ``arguments`` are further keywords as YAML."""
    try:
        keywords = parse_yaml(arguments)
    except ValueError as error:
        raise DataError(f"--model-args {shown(arguments)} is not YAML: {error}") from error
    if not isinstance(keywords, dict | None):
        raise DataError(
            f"--model-args must be a mapping such as '{{upscale: 1}}', not {shown(arguments)}"
        )
    keywords = {str(key): value for key, value in (keywords or {}).items()}
    with outlines():
        if not hasattr(create(name, **keywords), "upscale"):
            raise DataError(f"{name} does not output images: use one of list_models('hat*')")
    # Without a file, the error says where to find the published weights.
    model: nn.Module = create(
        name, pretrained=checkpoint is None, checkpoint_path=checkpoint, **keywords
    )
    return model


def parse_size(text: str) -> int:
    """``800M`` or ``1.5G`` in bytes; a plain number is in MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    unit = " KMGT".index(match[2].upper() or "M") if match is not None else 0
    size = float(match[1]) * 1024**unit if match is not None else 0
    if not 1 <= size < sys.maxsize:
        raise DataError(f"--max-memory must be a size such as 800M or 2G, not {shown(text)}")
    return int(size)
