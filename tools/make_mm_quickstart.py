"""Write a small detection and segmentation set from the picture of coins inside scikit-image.

    python tools/make_mm_quickstart.py --out runs/quickstart

The left 242 columns of the picture give the training images, the others those of validation, so
that no pixel is in both (of one coin, each side has a half). Boxes and masks are the picture's own
segmentation: a watershed of its gradient from dark and bright markers, holes filled, parts
labelled. The folder holds ``images/{train,val}/*.png``, their COCO
annotations ``{train,val}.json`` and, for mmseg, ``masks/{train,val}/*.png`` with 1 on coins.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import data, filters, measure, morphology, segmentation

SIDE = 128
SPLIT = 242
SMALLEST = 150


def label_coins() -> tuple[np.ndarray, np.ndarray]:
    """The picture (H, W) in 8 bits, and the number of the coin at each pixel, 0 for none."""
    picture = data.coins()
    markers = np.zeros(picture.shape, dtype=np.int32)
    markers[picture < 30] = 1
    markers[picture > 150] = 2
    coins = segmentation.watershed(filters.sobel(picture), markers) == 2
    coins = morphology.opening(ndimage.binary_fill_holes(coins), morphology.disk(3))
    return picture, measure.label(coins)


def make_crops(
    picture: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """``count`` crops of SIDE×SIDE, turned and mirrored, of the picture and its labels."""
    crops = []
    for _ in range(count):
        top, left = (rng.integers(0, extent - SIDE + 1) for extent in picture.shape)
        window = np.s_[top : top + SIDE, left : left + SIDE]
        turns, mirror = rng.integers(4), rng.integers(2)
        pair = [np.rot90(part[window], turns) for part in (picture, labels)]
        crops.append(tuple(np.ascontiguousarray(p[:, ::-1] if mirror else p) for p in pair))
    return crops


def write_split(
    folder: Path, split: str, crops: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, Any]:
    """Write images, masks and annotations of a split; returns the annotations."""
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "coin"}],
    }
    for kind in ("images", "masks"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    for number, (picture, labels) in enumerate(crops):
        name = f"{number:03d}.png"
        Image.fromarray(np.stack([picture] * 3, -1)).save(folder / "images" / split / name)
        shown = np.zeros_like(labels, dtype=np.uint8)
        coco["images"].append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
        for region in measure.regionprops(labels):
            if region.area < SMALLEST:
                continue
            mask = labels == region.label
            shown[mask] = 1
            top, left, bottom, right = region.bbox
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [int(left), int(top), int(right - left), int(bottom - top)],
                    "area": int(region.area),
                    "iscrowd": 0,
                    "segmentation": [_outline(mask)],
                }
            )
        Image.fromarray(shown).save(folder / "masks" / split / name)
    (folder / f"{split}.json").write_text(json.dumps(coco))
    return coco


def _outline(mask: np.ndarray) -> list[float]:
    """The longest contour as x, y, x, y, …"""
    contours = measure.find_contours(np.pad(mask, 1).astype(np.float64), 0.5)
    # Contours run through pixel centres, one off because of the padding; COCO counts from corners.
    return (max(contours, key=len)[::2, ::-1] - 0.5).ravel().round(1).tolist()


def main(argv: Sequence[str] | None = None) -> None:
    """Write the set as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="the folder")
    parser.add_argument("--train", type=int, default=64, help="training images")
    parser.add_argument("--val", type=int, default=8, help="validation images")
    args = parser.parse_args(argv)
    picture, labels = label_coins()
    for split, count, part in (
        ("train", args.train, np.s_[:, :SPLIT]),
        ("val", args.val, np.s_[:, SPLIT:]),
    ):
        rng = np.random.default_rng(0)
        write_split(args.out, split, make_crops(picture[part], labels[part], count, rng))


if __name__ == "__main__":
    main()
