"""Train a detector or segmenter through mmengine's Runner.

    python tools/train_mm.py configs/det/quickstart_retinanet.py
    torchrun --nproc-per-node 8 tools/train_mm.py CONFIG --launcher pytorch --amp
    torchrun --nproc-per-node 2 tools/train_mm.py CONFIG --launcher pytorch  # also without a GPU
    srun --ntasks 16 … python tools/train_mm.py CONFIG --launcher slurm

Logs and checkpoints go to ``--work-dir``, by default ``runs/mm/<name of the config>``. Scale the
config's learning rate with ``--cfg-options optim_wrapper.optimizer.lr=…`` if the number of GPUs
differs from that in its name. The quickstarts create their pictures if missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

from backbones.openmmlab.runs import load_config, processes, provide_data, shared_arguments


def main(argv: Sequence[str] | None = None) -> Runner:
    """Train as given by the command line; returns the runner."""
    parser = shared_arguments(__doc__ or "")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="continue from this checkpoint; without a value, from the folder's last",
    )
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision: mmengine's; bfloat16 on a CPU"
    )
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


if __name__ == "__main__":
    main()
