"""The command-line tools on coins: write the set, train, resume, evaluate, draw."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from mmengine.config import Config
from PIL import Image
from torch import distributed, nn

from backbones.openmmlab import CPUAmpOptimWrapper, allow_mmengine_checkpoints, quickstart
from backbones.openmmlab.runs import load_config, processes, provide_data, shared_arguments

ROOT = Path(__file__).parents[2]
QUICKSTARTS = [
    "det/quickstart_retinanet",
    "det/quickstart_mask-rcnn",
    "seg/quickstart_fpn",
    "seg/quickstart_upernet",
]


@pytest.fixture(scope="module", autouse=True)
def segmented_once() -> Iterator[None]:
    """The pictures that every set is cut from take a second to segment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("label_coins", "label_galaxies"):
            patch.setattr(quickstart, name, functools.cache(getattr(quickstart, name)))
        yield


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mm", ROOT / "tools" / "mm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _config(name: str) -> str:
    return str(ROOT / "configs" / f"{name}.py")


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def _inside(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, train: int, val: int
) -> None:
    """Work in a folder that has the set, as the configs expect."""
    monkeypatch.chdir(folder)
    tool.main(["data", "--train", str(train), "--val", str(val)])


@pytest.mark.parametrize("name", ["det/quickstart_retinanet", "seg/quickstart_fpn"])
def test_a_quickstart_makes_its_set_once(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(_config(name))
    cfg.quickstart_data.update(train=2, val=1)
    provide_data(cfg, [Path("mine.png")])
    assert not any(tmp_path.iterdir())
    provide_data(cfg, [Path("mine.png"), tmp_path / "runs/mm/data/images/val/000.png"])
    assert (
        capsys.readouterr().out == "creating runs/mm/data: 2 training images, 1 validation images\n"
    )
    data = tmp_path / "runs/mm/data"
    made = {path: path.stat().st_mtime_ns for path in data.rglob("*.*")}
    assert len(made) == 8
    provide_data(cfg)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.*")} == made
    assert capsys.readouterr().out == ""
    (data / "train.json").unlink()
    provide_data(cfg)
    assert (data / "train.json").is_file()


def test_validation_pictures_share_no_pixels_with_training(tmp_path, monkeypatch):
    columns = np.broadcast_to(np.arange(255, -1, -0.5)[None, :, None], (160, 512, 3))
    picture = columns.astype(np.uint8), np.ones((160, 512), int)
    for name in ("label_coins", "label_galaxies"):
        monkeypatch.setattr(quickstart, name, lambda: picture)
    quickstart.write_set(tmp_path, 4, 4)
    splits = [tmp_path.glob(f"images/{split}/*.png") for split in ("train", "val")]
    train, val = (np.stack([_pixels(path) for path in paths]) for paths in splits)
    assert train.min() > val.max()


def test_the_set(tool, tmp_path):
    tool.main(["data", "--out", str(tmp_path), "--train", "6", "--val", "2"])
    coco = json.loads((tmp_path / "train.json").read_text())
    assert len(coco["images"]) == 6 and len(coco["annotations"]) >= 12
    from pycocotools import mask as masks

    for image in coco["images"]:
        assert _pixels(tmp_path / "images/train" / image["file_name"]).shape == (128, 128, 3)
        mask = _pixels(tmp_path / "masks/train" / image["file_name"])
        categories = {n["category_id"] for n in coco["annotations"] if n["image_id"] == image["id"]}
        # Coins and galaxies take turns.
        assert categories == {1 + image["id"] % 2} == set(np.unique(mask)) - {0}
        shown = mask > 0
        areas = [n["area"] for n in coco["annotations"] if n["image_id"] == image["id"]]
        assert sum(areas) == shown.sum()
        drawn = np.zeros_like(mask)
        for note in coco["annotations"]:
            if note["image_id"] != image["id"]:
                continue
            x, y, width, height = note["bbox"]
            assert min(width, height) > 0 and x + width <= 128 and y + height <= 128
            inside = masks.decode(masks.merge(masks.frPyObjects(note["segmentation"], 128, 128)))
            rows, columns = np.nonzero(inside)
            # The outline rounds corners: at most a pixel less a side.
            assert abs(rows.min() - y) <= 1 and abs(columns.max() + 1 - x - width) <= 1
            drawn |= inside
        assert (drawn & shown).sum() / (drawn | shown).sum() > 0.9


@pytest.mark.parametrize("name", QUICKSTARTS[1::2])
def test_train_resume_evaluate_draw(tool, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "SIDE", 64)
    detects = name.startswith("det")
    # Two steps each time.
    length, last = ("max_epochs", "epoch_{}.pth") if detects else ("max_iters", "iter_{}.pth")
    ends = (1, 2) if detects else (2, 4)
    smaller = [] if detects else ["model.data_preprocessor.size=(64,64)"]

    def options(end: int, run: str) -> list[str]:
        return [
            "--cfg-options",
            "quickstart_data.train=8",
            "quickstart_data.val=2",
            f"train_cfg.{length}={end}",
            "train_cfg.val_interval=100",
            f"default_hooks.checkpoint.interval={ends[0]}",
            f"experiment_name={tmp_path.name}-{run}",
            *smaller,
        ]

    first = tool.main(["train", _config(name), *options(ends[0], "first")])
    folder = tmp_path / "runs/mm" / Path(name).name
    assert Path(first.work_dir) == folder
    assert first.iter == 2 and (folder / last.format(ends[0])).is_file()

    second = tool.main(["train", _config(name), "--resume", *options(ends[1], "second")])
    assert second.iter == 4
    allow_mmengine_checkpoints()  # which the maintained fork forgets after a load of its own
    saved = torch.load(folder / last.format(ends[1]), weights_only=True)
    moments = saved["optimizer"]["state"][0]["step"]
    assert float(moments) == 4

    rmtree(tmp_path / "runs/mm/data")
    checkpoint = str(folder / last.format(ends[1]))
    last_options = [f"experiment_name={tmp_path.name}-test"]
    last_options += ["quickstart_data.train=8", "quickstart_data.val=2", *smaller]
    metrics = tool.main(["test", _config(name), checkpoint, "--cfg-options", *last_options])
    assert ({"coco/bbox_mAP", "coco/segm_mAP"} if detects else {"mIoU"}) <= set(metrics)

    picture = tmp_path / "runs/mm/data/images/val/000.png"
    arguments = ["--config", _config(name), "--checkpoint", checkpoint, "--out", "pictures"]
    written = tool.main(["infer", str(picture), *arguments, "--score-thr", "0"])
    assert written == [Path("pictures/000.png")]
    assert not np.array_equal(_pixels(written[0])[..., :3], _pixels(picture))


def test_infer_refuses(tool, tmp_path):
    end = ["--config", _config(QUICKSTARTS[0]), "--out", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere.pth"):
        tool.main(["test", _config(QUICKSTARTS[0]), "nowhere.pth"])
    with pytest.raises(FileNotFoundError, match="no file at missing.png"):
        tool.main(["infer", "missing.png", *end, "--checkpoint", "missing.pth"])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").touch()
    (tmp_path / "c.pth").touch()
    pair = [str(tmp_path / folder / "x.png") for folder in ("a", "b")]
    with pytest.raises(ValueError, match="same name"):
        tool.main(["infer", *pair, *end, "--checkpoint", str(tmp_path / "c.pth")])
    wrong = tmp_path / "wrong.py"
    wrong.write_text(f"_base_ = [{end[1]!r}]\nmodel = dict(neck=dict(in_channels=[1, 2, 3, 4]))\n")
    end[1] = str(wrong)
    with pytest.raises(ValueError, match=r"write in_channels=\[32, 64, 160, 256\]"):
        tool.main(["infer", pair[0], *end, "--checkpoint", str(tmp_path / "c.pth")])


def test_nothing_that_is_read_is_overwritten(tool, tmp_path):
    image, weights = tmp_path / "a.png", tmp_path / "b.pth"
    Image.new("RGB", (8, 8)).save(image)
    weights.touch()
    words = ["--config", _config(QUICKSTARTS[0]), "--checkpoint", str(weights)]
    with pytest.raises(ValueError, match=r"a\.png would overwrite .*a\.png, an input"):
        tool.main(["infer", str(image), *words, "--out", str(tmp_path)])
    config = tmp_path / "mine.py"
    config.write_text("model = dict()\n")
    for words in (["--work-dir", str(tmp_path)], ["--cfg-options", f"work_dir={tmp_path}"]):
        with pytest.raises(ValueError, match=r"mine\.py would be overwritten: give another --work"):
            load_config(shared_arguments("").parse_args([str(config), *words]))


def test_a_set_replaces_nothing_unasked(tool, tmp_path):
    with pytest.raises(ValueError, match="val must be 1 image or more, got 0"):
        quickstart.write_set(tmp_path / "set", 1, 0)
    (tmp_path / "images" / "val").mkdir(parents=True)
    (tmp_path / "images" / "val" / "000.png").write_text("a photograph")
    words = ["--out", str(tmp_path), "--train", "2", "--val", "1"]
    with pytest.raises(ValueError, match="images/val/000.png exists and is not an earlier"):
        tool.main(["data", *words])
    assert [p.name for p in tmp_path.iterdir()] == ["images"]
    tool.main(["data", *words, "--overwrite"])
    assert (tmp_path / "images" / "val" / "000.png").stat().st_size > 100


def test_options_reach_the_config(tool, tmp_path, monkeypatch):
    seen: list[Config] = []
    monkeypatch.setattr(tool, "get_device", lambda: "cuda")
    monkeypatch.setattr(tool.Runner, "from_cfg", lambda cfg: seen.append(cfg) or _NoRun())
    tool.main(
        ["train", _config("seg/van/upernet_van-b0_8xb2-160k_ade20k-512x512"), "--amp"]
        + ["--work-dir", str(tmp_path), "--resume", "x.pth"]
        + ["--cfg-options", "train_dataloader.batch_size=3"]
    )
    (cfg,) = seen
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert cfg.optim_wrapper.loss_scale == "dynamic"
    assert cfg.resume and cfg.load_from == "x.pth"
    assert cfg.work_dir == str(tmp_path)
    assert cfg.train_dataloader.batch_size == 3
    assert cfg.model.decode_head.norm_cfg.type == "BN"
    (tmp_path / "x.pth").touch()
    assert tool.main(["test", cfg.filename, str(tmp_path / "x.pth")]) == {"mIoU": 1.0}
    assert seen[1].load_from == str(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"write in_channels=\[32, 64, 160, 256\]"):
        tool.main(
            ["train", cfg.filename, "--cfg-options", "model.decode_head.in_channels=[1,2,3,4]"]
        )


@pytest.mark.parametrize(
    "name", [pytest.param(QUICKSTARTS[1], marks=pytest.mark.slow), QUICKSTARTS[3]]
)
def test_mixed_precision_on_a_cpu(tool, name, tmp_path, monkeypatch):
    """All convolutions of the training run in bfloat16, and it learns."""
    # Small images and few regions: not every CPU has products of bfloat16, and others take long.
    monkeypatch.setattr(quickstart, "SIDE", 64)
    _inside(tool, monkeypatch, tmp_path, train=4, val=1)
    monkeypatch.setattr(tool, "get_device", lambda: "cpu")
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def watch(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            seen[module.training].add(output.dtype)

    detects = name.startswith("det")
    options = [
        f"train_cfg.{'max_epochs' if detects else 'max_iters'}=12",
        "default_hooks.logger.interval=1",
        "optim_wrapper.loss_scale=dynamic",  # as a config for GPUs may have it
        "param_scheduler=None",
        f"experiment_name={tmp_path.name}",
    ]
    smaller = "train_cfg.rcnn.sampler.num=8" if detects else "data_preprocessor.size=(64,64)"
    options.append(f"model.{smaller}")
    with nn.modules.module.register_module_forward_hook(watch):
        runner = tool.main(["train", _config(name), "--amp", "--cfg-options", *options])
    # The validation at the end is in float32, as with mmengine's wrapper.
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert type(runner.optim_wrapper) is CPUAmpOptimWrapper
    assert {p.dtype for p in runner.model.parameters()} == {torch.float32}
    losses, _ = runner.message_hub.get_scalar("train/loss").data
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_launchers_that_need_cuda_say_so(tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    for launcher in ("slurm", "pytorch"):
        with pytest.raises(ValueError, match=f"--launcher {launcher} needs CUDA.*under torchrun"):
            tool.main(["train", _config(QUICKSTARTS[0]), "--launcher", launcher])


def test_the_group_of_processes_ends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # One process, as torchrun would tell it; the store takes any free port.
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", **addresses}.items():
        monkeypatch.setenv(name, value)
    cfg = Config(dict(launcher="pytorch", env_cfg=dict(dist_cfg=dict(timeout=7))))
    with processes(cfg):
        group = distributed.distributed_c10d._get_default_group()
        assert distributed.get_backend(group) == "gloo"
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)
        with processes(cfg):
            pass  # nothing changes for who is in a group already
        assert distributed.is_initialized()
    assert not distributed.is_initialized()
    with pytest.raises(KeyError, match="lost"), processes(cfg):
        raise KeyError("lost")
    assert not distributed.is_initialized()
    with processes(Config(dict(launcher="none"))):
        assert not distributed.is_initialized()


@pytest.mark.slow
def test_two_processes_on_a_cpu(tool, tmp_path, monkeypatch):
    """torchrun and gloo: one makes the set, each takes half; one checkpoint, evaluated by both."""
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "tools/mm.py", "train", _config(QUICKSTARTS[0]), "--launcher=pytorch"]
    command += ["--cfg-options", "train_dataloader.batch_size=1", "train_cfg.max_epochs=1"]
    command += ["quickstart_data.train=4", "quickstart_data.val=2"]
    command += ["train_cfg.val_interval=1", "model.test_cfg.score_thr=0.0"]
    command += ["default_hooks.checkpoint.interval=1", "default_hooks.logger.interval=1"]
    # Longer than any wait of theirs for each other, so that they end by themselves if they can.
    command += ["env_cfg.dist_cfg.timeout=120"]
    said = run(command, timeout=300, env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert said.count("creating runs/mm/data") == 1
    assert "[1][2/2]" in said and "[1][4/4]" not in said
    assert "coco/bbox_mAP" in said
    saved = torch.load(tmp_path / "runs/mm/quickstart_retinanet/epoch_1.pth", weights_only=True)
    assert not any(name.startswith("module.") for name in saved["state_dict"])


class _NoRun:
    """Instead of mmengine's runner."""

    def train(self) -> None: ...

    def test(self) -> dict[str, float]:
        return {"mIoU": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric", "floor"),
    [
        ("det/quickstart_retinanet", "coco/bbox_mAP_50", 0.6),
        ("det/quickstart_mask-rcnn", "coco/segm_mAP_50", 0.6),
        ("seg/quickstart_fpn", "mIoU", 80),
        ("seg/quickstart_upernet", "mIoU", 80),
    ],
)
def test_quickstart_learns(tool, name, metric, floor, tmp_path, monkeypatch):
    _inside(tool, monkeypatch, tmp_path, train=64, val=12)
    runner: Any = tool.main(
        ["train", _config(name), "--cfg-options", f"experiment_name={tmp_path.name}"]
    )
    losses, _ = runner.message_hub.get_scalar("train/loss").data
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])
    assert runner.message_hub.get_scalar(f"val/{metric}").current() > floor
    assert os.listdir(runner.work_dir)


def test_without_openmmlab_the_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "tools" / "mm.py"))
    assert capsys.readouterr().err == "error: mmcv is missing: pip install '.[mm]'\n"
