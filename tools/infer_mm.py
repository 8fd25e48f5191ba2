"""Draw the predictions of a trained detector or segmenter.

    python tools/infer_mm.py IMAGE… --config CONFIG --checkpoint CHECKPOINT --out FOLDER

One picture per image is written to the folder, under the image's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mmcv
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, init_default_scope

from backbones.common.arguments import nonempty, nonempty_path
from backbones.common.outputs import Kind, add_overwrite, require_writable
from backbones.openmmlab import check_channels
from backbones.openmmlab.runs import provide_data

_PICTURE = Kind((".png",), rb"\x89PNG")


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw predictions as given by the command line; returns the written pictures.

    Raises:
        FileNotFoundError: an image or the checkpoint does not exist.
        ValueError: two images with the same name, a picture that would replace an image, or
            incompatible parts of the model.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=nonempty_path, metavar="IMAGE")
    parser.add_argument(
        "--config", required=True, type=nonempty, help="a file of configs/det or configs/seg"
    )
    parser.add_argument(
        "--checkpoint", required=True, type=nonempty_path, help="a .pth of training"
    )
    parser.add_argument("--out", required=True, type=nonempty_path, help="folder of the pictures")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--score-thr", type=float, default=0.3, help="minimum score of drawn boxes")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    cfg = Config.fromfile(args.config)
    provide_data(cfg, args.images)
    for path in (*args.images, args.checkpoint):
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
    if len({path.stem for path in args.images}) < len(args.images):
        raise ValueError("two images have the same name; draw them into different folders")

    targets = [args.out / f"{path.stem}.png" for path in args.images]
    require_writable(
        {
            f"the picture of {i}:": (target, _PICTURE)
            for i, target in zip(args.images, targets, strict=True)
        },
        [args.config, args.checkpoint, *args.images],
        args.overwrite,
        makes_folders=True,
    )
    check_channels(cfg.model)
    init_default_scope(cfg.default_scope)
    detects = cfg.default_scope == "mmdet"
    # Imported here, since they need the stand-ins of backbones.openmmlab.
    if detects:
        from mmdet.apis import inference_detector as infer
        from mmdet.apis import init_detector as init
    else:
        from mmseg.apis import inference_model as infer
        from mmseg.apis import init_model as init

        steps = cfg.test_dataloader.dataset.pipeline
        cfg.test_pipeline = [step for step in steps if step.type != "LoadAnnotations"]
    model = init(cfg, str(args.checkpoint), device=args.device)
    visualizer = VISUALIZERS.build({**cfg.visualizer, "name": "infer_mm", "vis_backends": None})
    visualizer.dataset_meta = model.dataset_meta
    args.out.mkdir(parents=True, exist_ok=True)
    for path, target in zip(args.images, targets, strict=True):
        options = {"pred_score_thr": args.score_thr} if detects else {}
        visualizer.add_datasample(
            path.stem,
            mmcv.imread(str(path), channel_order="rgb"),
            data_sample=infer(model, str(path)),
            draw_gt=False,
            out_file=str(target),
            **options,
        )
    return targets


if __name__ == "__main__":
    main()
