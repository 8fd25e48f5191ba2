"""Write the quickstarts' detection and segmentation data set, of any size.

    python tools/make_mm_quickstart.py --out runs/coins --train 400 --val 40

Coins and galaxies from two pictures bundled with scikit-image, in COCO's and mmseg's formats.
Training with a quickstart config creates it automatically, as ``runs/mm/data``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from backbones.core.arguments import nonempty_path
from backbones.openmmlab.quickstart import write_set


def main(argv: Sequence[str] | None = None) -> None:
    """Run from a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=nonempty_path, default=Path("runs/mm/data"), help="the folder"
    )
    parser.add_argument("--train", type=int, default=64, help="training images")
    parser.add_argument("--val", type=int, default=12, help="validation images")
    args = parser.parse_args(argv)
    write_set(args.out, args.train, args.val)


if __name__ == "__main__":
    main()
