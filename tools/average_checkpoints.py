"""Average the weights of several checkpoints of one architecture: a uniform model soup.

    python tools/average_checkpoints.py runs/a/best.safetensors runs/b/best.safetensors \\
        --output soup.safetensors

https://arxiv.org/abs/2203.05482. The files may have any format that
:func:`backbones.load_checkpoint` reads; averaged weights in a ``last.pt`` take precedence.
Floating-point tensors are averaged in float64; others (counters) are copied from the first file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from backbones.common.arguments import nonempty_path
from backbones.common.console import Parser, guard
from backbones.common.files import save_weights
from backbones.common.outputs import Kind, add_overwrite, require_writable
from backbones.core.checkpoint import CheckpointError, read_checkpoint

_AVERAGE = Kind((".safetensors",), rb".{8}\{\"__metadata__\":\{\"average_of\"")


def average(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the checkpoints at ``paths``, in the dtypes of the first.

    Raises:
        FileNotFoundError, CheckpointError: a file is missing or unreadable, has NaN or infinite
            values, or its tensors differ from those of the first in name or shape.
    """
    first = _read(paths[0])
    sums = {k: v.double() for k, v in first.items() if v.is_floating_point()}
    for path in paths[1:]:
        tensors = _read(path)
        unlike = sorted(tensors.keys() ^ first.keys())
        unlike += [k for k in first if k in tensors and tensors[k].shape != first[k].shape]
        if unlike:
            names = ", ".join(unlike[:3])
            raise CheckpointError(f"{path} is of another architecture than {paths[0]}: {names}")
        for key in sums:
            sums[key] += tensors[key]
    return {
        key: (sums[key] / len(paths)).to(value.dtype) if key in sums else value
        for key, value in first.items()
    }


def _read(path: Path) -> dict[str, Tensor]:
    tensors = read_checkpoint(path)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.double()).all():
            raise CheckpointError(f"{path}: {key} is not finite")
    return tensors


def main(argv: Sequence[str] | None = None) -> int:
    """Run from a command line and return the exit status."""
    return guard(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=nonempty_path, metavar="FILE")
    parser.add_argument("--output", type=nonempty_path, required=True, help="a .safetensors file")
    add_overwrite(parser)
    options = parser.parse_args(argv)
    written = {"--output": (options.output, _AVERAGE)}
    require_writable(written, options.checkpoints, options.overwrite)
    with torch.inference_mode():
        mean = average(options.checkpoints)
    sources = ", ".join(path.name for path in options.checkpoints)
    save_weights(options.output, mean, {"average_of": sources})
    sys.stdout.write(f"the mean of {len(options.checkpoints)} checkpoints is {options.output}\n")


if __name__ == "__main__":
    sys.exit(main())
