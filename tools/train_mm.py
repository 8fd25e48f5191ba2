"""Train a detector or segmenter through mmengine's Runner.

    python tools/train_mm.py configs/det/quickstart_retinanet.py
    torchrun --nproc-per-node 8 tools/train_mm.py CONFIG --launcher pytorch --amp
    torchrun --nproc-per-node 2 tools/train_mm.py CONFIG --launcher pytorch  # also without a GPU
    srun --ntasks 16 … python tools/train_mm.py CONFIG --launcher slurm

Logs and checkpoints go to ``--work-dir``, by default ``runs/mm/<name of the config>``. Learning
rates are the config's: scale them by ``--cfg-options optim_wrapper.optimizer.lr=…`` where the
number of GPUs is not that in its name.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.runner import Runner

from backbones._mm_runs import load_config, shared_arguments


def main(argv: Sequence[str] | None = None) -> Runner:
    """Train as the command line says; returns the runner, for what one wants of it next."""
    parser = shared_arguments(__doc__ or "")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="go on from this checkpoint; without a value, from the folder's last",
    )
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    args = parser.parse_args(argv)
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


if __name__ == "__main__":
    main()
