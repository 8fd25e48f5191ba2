"""Restoration models: super-resolution, denoising, JPEG artifacts, real photographs.

    python tools/sr.py train --config configs/sr/quickstart.yaml
    python tools/sr.py train --config configs/sr/hat.yaml --model hat_x2 \\
        --train-pictures DF2K/HR --val-pictures Set5/HR
    torchrun --nproc-per-node 8 tools/sr.py train --config …
    python tools/sr.py validate data/Set5 data/Urban100 --model hat_x4 \\
        --checkpoint HAT_SRx4.pth --csv scores.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbones.common.console import Parser, guard  # noqa: E402
from backbones.restoration import train, validate  # noqa: E402

_COMMANDS = {
    "train": (
        train.main,
        """Train a restoration model.

Every key of the recipe is a flag; --print-config prints the resolved recipe. Results go to
OUTPUT/NAME/; --resume auto continues after a crash.
""",
    ),
    "validate": (
        validate.main,
        """PSNR and SSIM of a super-resolution model on Set5, Set14, BSD100, Urban100, Manga109, …

A folder contains pictures, or subfolders HR (or GTmod12, …) and LR (or LRbicx4, X4, …); missing
low-resolution pictures are made with MATLAB's bicubic kernel. As in papers, metrics are computed
on luma, without a border as wide as the scale.
""",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(description=__doc__, usage=f"sr.py {{{','.join(_COMMANDS)}}} …")
    parser.add_argument("command", choices=list(_COMMANDS), help="each has its own --help")
    command, description = _COMMANDS[parser.parse_args(words[:1]).command]
    return command(words[1:], description)


if __name__ == "__main__":
    sys.exit(guard(main))
