"""A small detection and segmentation data set from two pictures bundled with scikit-image.

Images alternate between coins (Greek coins from Pompeii) and galaxies (Hubble's deep field,
enlarged twice). Training images come from the left part of each picture, validation images from
the right part, so that they share no pixels (a coin may be split between both). Boxes and masks
come from segmentations: for coins, a watershed of the gradient from dark and bright markers with
filled holes; for galaxies, a threshold after smoothing; followed by connected components. The
folder contains ``images/{train,val}/*.png``, their COCO annotations ``{train,val}.json`` and, for
mmseg, ``masks/{train,val}/*.png`` with 1 for coins and 2 for galaxies.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from scipy import ndimage
from skimage import color, data, filters, measure, morphology, segmentation

from backbones.common.files import write_text_atomically

CLASSES = ("coin", "galaxy")
SIDE = 128
# Columns left of this fraction of the width are for training.
SPLIT = 0.63
SMALLEST = 300


def make_once(folder: Path, train: int, val: int) -> None:
    """:func:`write_set`, unless the data set exists; among several processes, only one does."""
    if _is_whole(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not _is_whole(folder):
            sys.stdout.write(
                f"creating {folder}: {train} training images, {val} validation images\n"
            )
            write_set(folder, train, val)


def write_set(folder: Path, train: int, val: int) -> None:
    """Write so many images, and at the end their annotations; existing files are replaced."""
    counts = {"train": train, "val": val}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"{split} must be 1 image or more, got {count}")
    rng = np.random.default_rng(0)
    sources = [label_coins(), label_galaxies()]
    annotations = {folder / f"{split}.json": "" for split in counts}
    for path in annotations:
        path.unlink(missing_ok=True)
    for path, (split, count) in zip(annotations, counts.items(), strict=True):
        crops = []
        for category, (picture, labels) in enumerate(sources, 1):
            border = int(SPLIT * labels.shape[1])
            part = np.s_[:, :border] if split == "train" else np.s_[:, border:]
            share = -(-count // len(sources))
            made = make_crops(picture[part], labels[part], share, rng)
            crops.append([(category, *crop) for crop in made])
        taking_turns = itertools.chain.from_iterable(zip(*crops, strict=True))
        coco = write_split(folder, split, list(taking_turns)[:count])
        annotations[path] = json.dumps(coco)
    for path, text in annotations.items():
        write_text_atomically(path, text)


def _is_whole(folder: Path) -> bool:
    """Whether the annotations exist, which :func:`write_set` writes last."""
    return all((folder / name).is_file() for name in ("train.json", "val.json"))


def label_coins() -> tuple[np.ndarray, np.ndarray]:
    """The 8-bit picture (H, W, 3), and the label of the coin at each pixel, 0 for none."""
    picture = data.coins()
    markers = np.zeros(picture.shape, dtype=np.int32)
    markers[picture < 30] = 1
    markers[picture > 150] = 2
    coins = segmentation.watershed(filters.sobel(picture), markers) == 2
    coins = morphology.opening(ndimage.binary_fill_holes(coins), morphology.disk(3))
    return np.stack([picture] * 3, -1), measure.label(coins)


def label_galaxies() -> tuple[np.ndarray, np.ndarray]:
    """The same for galaxies (and the few bright stars among them)."""
    picture = Image.fromarray(data.hubble_deep_field())
    large = np.asarray(
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BILINEAR)
    )
    bright = filters.gaussian(color.rgb2gray(large), 3) > 0.2
    return large, measure.label(ndimage.binary_fill_holes(bright))


def make_crops(
    picture: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """``count`` randomly rotated and mirrored crops of SIDE×SIDE of the picture and its labels.

    Each contains at least one object.
    """
    crops: list[tuple[np.ndarray, np.ndarray]] = []
    while len(crops) < count:
        top, left = (rng.integers(0, extent - SIDE + 1) for extent in labels.shape)
        window = np.s_[top : top + SIDE, left : left + SIDE]
        if np.bincount(labels[window].ravel(), minlength=2)[1:].max() < SMALLEST:
            continue
        turns, mirror = int(rng.integers(4)), rng.integers(2)
        pair = [np.rot90(part[window], turns) for part in (picture, labels)]
        image, numbers = (np.ascontiguousarray(p[:, ::-1] if mirror else p) for p in pair)
        crops.append((image, numbers))
    return crops


def write_split(
    folder: Path, split: str, crops: Sequence[tuple[int, np.ndarray, np.ndarray]]
) -> dict[str, Any]:
    """Write images and masks of a split; returns the annotations.

    ``crops`` are category (from 1), picture and labels of each image.
    """
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    }
    for kind in ("images", "masks"):
        (folder / kind / split).mkdir(parents=True, exist_ok=True)
    for number, (category, picture, labels) in enumerate(crops):
        name = f"{number:03d}.png"
        Image.fromarray(picture).save(folder / "images" / split / name)
        shown = np.zeros_like(labels, dtype=np.uint8)
        coco["images"].append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
        for region in measure.regionprops(labels):
            if region.area < SMALLEST:
                continue
            mask = labels == region.label
            shown[mask] = category
            top, left, bottom, right = region.bbox
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [int(left), int(top), int(right - left), int(bottom - top)],
                    "area": int(region.area),
                    "iscrowd": 0,
                    "segmentation": [_outline(mask)],
                }
            )
        Image.fromarray(shown).save(folder / "masks" / split / name)
    return coco


def _outline(mask: np.ndarray) -> list[float]:
    """The longest contour as x, y, x, y, …"""
    contours = measure.find_contours(np.pad(mask, 1).astype(np.float64), 0.5)
    # Contours run through pixel centres, one off because of the padding; COCO counts from corners.
    return (max(contours, key=len)[::2, ::-1] - 0.5).ravel().round(1).tolist()
