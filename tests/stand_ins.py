"""Small but valid files for those that the documentation's commands and code read."""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedding_runs import embed_images
from PIL import Image
from restoration_runs import make_pictures
from training_runs import TINY, make_images

import backbones
import train_cls
from backbones.cli import parity
from backbones.common.download import file_name
from backbones.common.files import save_weights

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 3
# Download folder for torch.hub.
DOWNLOADS = "downloads"


class Shelf:
    """Makes each file once and copies it to where it is needed.

    Args:
        folder: for the originals.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def provide(self, words: Iterable[str], clone: Path) -> None:
        """Copy the files that the words of a command need into ``clone``."""
        for place in dict.fromkeys(place for word in words for place in places(word)):
            kept, target = self.folder / place, clone / place
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                MAKERS[place](kept)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if kept.is_dir() else shutil.copy)(kept, target)


def places(word: str) -> tuple[str, ...]:
    """The keys of :data:`MAKERS` that a word of a command refers to."""
    place = word.rstrip("/")
    return NEEDS.get(word, (place,) if place in MAKERS else ())


def _picture(
    path: Path, size: tuple[int, int] = (16, 16), mode: str = "RGB", values: int = 256
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, values, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).convert(mode).save(path)


def _weights(name: str, path: Path, **arguments: Any) -> None:
    """Write a state dict with our parameter names."""
    torch.save(backbones.create_model(name, **arguments).state_dict(), path)


def _in_int8(name: str, path: Path) -> None:
    """Write the output of ``vision-backbones export --int8``."""
    state = backbones.create_model(name).eval().fuse(torch.int8).int8_state_dict()
    save_weights(path, state, {"model": name})


def _published(family: str, name: str, path: Path) -> None:
    """Write a state dict with the authors' parameter names."""
    torch.save({"state_dict": parity.checkpoint(parity.reference(family, name))}, path)


def _quickstart(path: Path) -> None:
    """Write the output of ``train_cls.py``."""
    recipe = ["--config", str(ROOT / "configs/cls/quickstart.yaml"), "--epochs=1", "--img-size=32"]
    words = [*recipe, *TINY, f"--output={path.parent}", f"--name={path.name}"]
    assert train_cls.main(words) == 0


def _embedded(path: Path) -> None:
    """Write the output of ``vision-backbones embed`` for a folder with ``train`` and ``val``."""
    made = path.with_name(f"{path.name}_made")
    made.mkdir()
    shutil.copytree(embed_images(made).table, path)


def _labels(path: Path) -> None:
    """Write the classes of these images."""
    keys = [f"train/class{i % 3}/{i:03}.png" for i in range(12)]
    path.write_text("key,label\n" + "".join(f"{key},{key.split('/')[1]}\n" for key in keys))


def _detector(config: str, path: Path) -> None:
    """Write the output of ``tools/mm.py train``."""
    with _openmmlab():
        from mmengine.config import Config
        from mmengine.registry import MODELS, init_default_scope

        cfg = Config.fromfile(ROOT / config)
        init_default_scope(cfg.default_scope)
        weights = MODELS.build(cfg.model).state_dict()
    about = cfg.train_dataloader.dataset.get("metainfo", {})
    torch.save({"state_dict": weights, "meta": {"dataset_meta": dict(about)}}, path)


@contextmanager
def _openmmlab() -> Iterator[None]:
    """Make OpenMMLab's packages importable, without warnings, within the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("backbones.openmmlab")  # installs the stand-ins that mmdet imports
        yield


def _coco(path: Path) -> None:
    """Write COCO 2017 with two pictures per split."""
    with _openmmlab():
        from mmdet.datasets import CocoDataset
    names = enumerate(CocoDataset.METAINFO["classes"], 1)
    square = {"bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    square |= {"segmentation": [[10, 10, 50, 10, 50, 50, 10, 50]], "category_id": 1}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 68} for i in range(2)],
        "annotations": [{"id": i + 1, "image_id": i, **square} for i in range(2)],
        "categories": [{"id": number, "name": name} for number, name in names],
    }
    (path / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        make_pictures(path / split, 2, side=64)
        (path / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def _ade20k(path: Path) -> None:
    """Write ADE20K with two pictures per split."""
    for split in ("training", "validation"):
        for number in range(2):
            _picture(path / f"images/{split}/{number}.jpg", (96, 64))
            _picture(path / f"annotations/{split}/{number}.png", (96, 64), "L", values=151)


_MASK_RCNN = "mask-rcnn_van-b2_fpn_1x_coco"
_HUB = f"{DOWNLOADS}/hub/checkpoints"
_VAN = "https://huggingface.co/Visual-Attention-Network/VAN-{}-original/resolve/main/{}"
_VAN_B0 = f"{_HUB}/{file_name(_VAN.format('Tiny', 'van_tiny_754.pth.tar'), 'van_b0')}"
_VAN_B2 = f"{_HUB}/{file_name(_VAN.format('Base', 'van_base_828.pth.tar'), 'van_b2')}"
# Path of a file or folder → the function that makes it.
MAKERS: dict[str, Callable[[Path], object]] = {
    "photos": lambda path: _picture(path / "photo.jpg"),
    "scans": lambda path: _picture(path / "page.tif", mode="L"),
    "a.jpg": _picture,
    "photo.jpg": _picture,
    "embedded": _embedded,
    "labels.csv": _labels,
    "images": lambda path: make_images(path, {"train": 6, "val": 3}, CLASSES),
    "data/Set5": lambda path: make_pictures(path, 2, side=64),
    "data/Urban100": lambda path: make_pictures(path, 2, side=64),
    "DF2K/HR": lambda path: make_pictures(path, 2, side=64),
    "Set5/HR": lambda path: make_pictures(path, 1, side=32),
    "data/coco": _coco,
    "data/ade/ADEChallengeData2016": _ade20k,
    "van_b0.pth": partial(_published, "van", "van_b0"),
    "van_b0_official.pth": partial(_published, "van", "van_b0"),
    _VAN_B0: partial(_published, "van", "van_b0"),
    _VAN_B2: partial(_published, "van", "van_b2"),
    "convnext_atto.pth": partial(_weights, "timm/convnext_atto"),
    "biformer_base.pth": partial(_weights, "biformer_base", num_classes=CLASSES),
    "van_b0-int8.safetensors": partial(_in_int8, "van_b0"),
    "HAT_SRx2.pth": partial(_weights, "hat_x2"),
    "HAT_SRx4.pth": partial(_weights, "hat_x4"),
    "runs/quickstart": _quickstart,
    "runs/mm/quickstart_mask-rcnn/epoch_16.pth": partial(
        _detector, "configs/det/quickstart_mask-rcnn.py"
    ),
    f"runs/mm/{_MASK_RCNN}/epoch_12.pth": partial(_detector, f"configs/det/van/{_MASK_RCNN}.py"),
}
# Paths needed by words that are not paths themselves, or by a page's code that does not name them.
NEEDS: dict[str, tuple[str, ...]] = {
    "README.md": (_VAN_B0,),
    "--pretrained": (_VAN_B0,),
    "scans/*.tif": ("scans",),
    "runs/quickstart/best.safetensors": ("runs/quickstart",),
    f"configs/det/van/{_MASK_RCNN}.py": ("data/coco", _VAN_B2),
    "configs/seg/van/upernet_van-b2_8xb2-160k_ade20k-512x512.py": (
        "data/ade/ADEChallengeData2016",
        _VAN_B2,
    ),
}
