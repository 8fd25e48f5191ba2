"""Write the quickstarts' detection and segmentation data set, of any size.

    python tools/make_mm_quickstart.py --out runs/coins --train 400 --val 40

Coins and galaxies from two pictures bundled with scikit-image, in COCO's and mmseg's formats.
Training with a quickstart config creates it automatically, as ``runs/mm/data``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from backbones.common.arguments import nonempty_path
from backbones.common.outputs import Kind, add_overwrite, require_writable
from backbones.openmmlab.quickstart import write_set


def _kind(name: str) -> Kind:
    """No earlier file is replaced unasked: photographs and annotations look alike."""
    return Kind((Path(name).suffix,), rb"(?!)")


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
    add_overwrite(parser)
    args = parser.parse_args(argv)
    parts = {"train": args.train, "val": args.val}
    names = [f"{part}.json" for part in parts]
    for part, count in parts.items():
        names += [f"{k}/{part}/{i:03d}.png" for k in ("images", "masks") for i in range(count)]
    outputs = {f"{name} of --out:": (args.out / name, _kind(name)) for name in names}
    require_writable(outputs, overwrite=args.overwrite, makes_folders=True)
    write_set(args.out, args.train, args.val)


if __name__ == "__main__":
    main()
