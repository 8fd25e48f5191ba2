"""Evaluate a detector or segmenter through mmengine's Runner.

python tools/test_mm.py CONFIG CHECKPOINT
torchrun --nproc-per-node 8 tools/test_mm.py CONFIG CHECKPOINT --launcher pytorch
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.runner import Runner

from backbones.common.arguments import nonempty
from backbones.openmmlab.runs import load_config, processes, provide_data, shared_arguments


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate as given by the command line; returns the metrics, which mmengine also logs."""
    parser = shared_arguments(__doc__ or "")
    parser.add_argument("checkpoint", type=nonempty, help="a .pth that training wrote")
    args = parser.parse_args(argv)
    cfg = load_config(args)
    if not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint at {args.checkpoint}")
    cfg.load_from = args.checkpoint
    provide_data(cfg)
    with processes(cfg):
        return Runner.from_cfg(cfg).test()


if __name__ == "__main__":
    main()
