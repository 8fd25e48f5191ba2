"""Detectors and segmenters: train, evaluate, draw predictions, write the quickstarts' data set.

    python tools/mm.py train configs/det/quickstart_retinanet.py
    torchrun --nproc-per-node 8 tools/mm.py train CONFIG --launcher pytorch --amp
    torchrun --nproc-per-node 2 tools/mm.py train CONFIG --launcher pytorch  # also without a GPU
    srun --ntasks 16 … python tools/mm.py train CONFIG --launcher slurm
    python tools/mm.py test CONFIG CHECKPOINT
    python tools/mm.py infer IMAGE… --config CONFIG --checkpoint CHECKPOINT --out FOLDER
    python tools/mm.py data --out runs/coins --train 400 --val 40

Training and evaluation are mmengine's. Logs and checkpoints go to ``--work-dir``, by default
``runs/mm/<name of the config>``. Scale the config's learning rate with
``--cfg-options optim_wrapper.optimizer.lr=…`` if the number of GPUs differs from that in its name.
The quickstarts create their pictures if missing: coins and galaxies from two pictures bundled with
scikit-image, in COCO's and mmseg's formats.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    import mmcv
    from mmengine.config import Config
    from mmengine.device import get_device
    from mmengine.registry import VISUALIZERS, init_default_scope
    from mmengine.runner import Runner
except ModuleNotFoundError as error:
    sys.stderr.write(f"error: {error.name} is missing: pip install '.[mm]'\n")
    sys.exit(2)

from backbones.common.arguments import nonempty, nonempty_path
from backbones.common.console import Parser
from backbones.common.outputs import Kind, add_overwrite, require_writable
from backbones.openmmlab import check_channels
from backbones.openmmlab.runs import load_config, processes, provide_data, shared_arguments

_PICTURE = Kind((".png",), rb"\x89PNG")


def train(argv: Sequence[str]) -> Runner:
    """Train through mmengine's Runner; returns it."""
    parser = _of(shared_arguments(train.__doc__ or ""), "train")
    text = "continue from this checkpoint; without a value, from the folder's last"
    parser.add_argument("--resume", nargs="?", const="auto", help=text)
    text = "mixed precision: mmengine's; bfloat16 on a CPU"
    parser.add_argument("--amp", action="store_true", help=text)
    args = parser.parse_args(argv)
    cfg = load_config(args)
    if args.amp:
        _mix_precision(cfg)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    provide_data(cfg)
    with processes(cfg):
        runner = Runner.from_cfg(cfg)
        runner.train()
    return runner


def _mix_precision(cfg: Config) -> None:
    """Let ``cfg`` train in mixed precision on the device that it will run on."""
    if get_device() != "cpu":
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
        return
    cfg.optim_wrapper.type = "CPUAmpOptimWrapper"
    for of_gpus in ("loss_scale", "dtype"):
        cfg.optim_wrapper.pop(of_gpus, None)


def test(argv: Sequence[str]) -> dict[str, float]:
    """Evaluate through mmengine's Runner; returns the metrics, which mmengine also logs."""
    parser = _of(shared_arguments(test.__doc__ or ""), "test")
    parser.add_argument("checkpoint", type=nonempty, help="a .pth that training wrote")
    args = parser.parse_args(argv)
    cfg = load_config(args)
    if not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint at {args.checkpoint}")
    cfg.load_from = args.checkpoint
    provide_data(cfg)
    with processes(cfg):
        metrics: dict[str, float] = Runner.from_cfg(cfg).test()
    return metrics


def infer(argv: Sequence[str]) -> list[Path]:
    """Draw predictions, a picture for each image under its name; returns the written pictures."""
    parser = _of(Parser(description="Draw predictions, a picture for each image."), "infer")
    add = parser.add_argument
    add("images", nargs="+", type=nonempty_path, metavar="IMAGE")
    add("--config", required=True, type=nonempty, help="a file of configs/det or configs/seg")
    add("--checkpoint", required=True, type=nonempty_path, help="a .pth of training")
    add("--out", required=True, type=nonempty_path, help="folder for the drawn images")
    add("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    add("--score-thr", type=float, default=0.3, help="minimum score of drawn boxes")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    cfg = Config.fromfile(args.config)
    provide_data(cfg, args.images)
    for path in (*args.images, args.checkpoint):
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
    if len({path.stem for path in args.images}) < len(args.images):
        raise ValueError("two images have the same name; draw them into different folders")
    targets = {image: args.out / f"{image.stem}.png" for image in args.images}
    written = {f"the picture of {i}:": (target, _PICTURE) for i, target in targets.items()}
    read = [args.config, args.checkpoint, *args.images]
    require_writable(written, read, args.overwrite, makes_folders=True)
    check_channels(cfg.model)
    init_default_scope(cfg.default_scope)
    detects = cfg.default_scope == "mmdet"
    # Imported here, since they need the stand-ins of backbones.openmmlab.
    if detects:
        from mmdet.apis import inference_detector as predict
        from mmdet.apis import init_detector as init
    else:
        from mmseg.apis import inference_model as predict
        from mmseg.apis import init_model as init

        steps = cfg.test_dataloader.dataset.pipeline
        cfg.test_pipeline = [step for step in steps if step.type != "LoadAnnotations"]
    model = init(cfg, str(args.checkpoint), device=args.device)
    visualizer = VISUALIZERS.build({**cfg.visualizer, "name": "infer", "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    args.out.mkdir(parents=True, exist_ok=True)
    options = {"pred_score_thr": args.score_thr} if detects else {}
    for path, target in targets.items():
        visualizer.add_datasample(
            path.stem,
            mmcv.imread(str(path), channel_order="rgb"),
            data_sample=predict(model, str(path)),
            draw_gt=False,
            out_file=str(target),
            **options,
        )
    return list(targets.values())


def data(argv: Sequence[str]) -> None:
    """Write the quickstarts' data set, of any size."""
    from backbones.openmmlab.quickstart import write_set

    parser = _of(Parser(description=data.__doc__), "data")
    out = Path("runs/mm/data")
    parser.add_argument("--out", type=nonempty_path, default=out, help="the folder")
    parser.add_argument("--train", type=int, default=64, help="training images")
    parser.add_argument("--val", type=int, default=12, help="validation images")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    parts = {"train": args.train, "val": args.val}
    names = [f"{part}.json" for part in parts]
    for part, count in parts.items():
        names += [f"{k}/{part}/{i:03d}.png" for k in ("images", "masks") for i in range(count)]
    # No earlier file is replaced unasked: photographs and annotations look alike.
    kinds = {name: Kind((Path(name).suffix,), rb"(?!)") for name in names}
    outputs = {f"{name} of --out:": (args.out / name, kind) for name, kind in kinds.items()}
    require_writable(outputs, overwrite=args.overwrite, makes_folders=True)
    write_set(args.out, args.train, args.val)


COMMANDS = {"train": train, "test": test, "infer": infer, "data": data}


def _of(parser: ArgumentParser, command: str) -> ArgumentParser:
    parser.prog = f"mm.py {command}"
    return parser


def main(argv: Sequence[str] | None = None) -> Any:
    """Run a command; returns what it returns."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(description=__doc__, usage=f"mm.py {{{','.join(COMMANDS)}}} …")
    parser.add_argument("command", choices=list(COMMANDS), help="each has its own --help")
    command = parser.parse_args(words[:1]).command
    return COMMANDS[command](words[1:])


if __name__ == "__main__":
    main()
