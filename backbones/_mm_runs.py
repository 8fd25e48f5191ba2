"""What the command-line tools for mmdet and mmseg share: arguments, and the config they make."""

from __future__ import annotations

import argparse
import atexit
import os
from pathlib import Path

import torch
import torch.distributed
from mmengine.config import Config, DictAction

from backbones.openmmlab import check_channels, without_sync_norm

__all__ = ["load_config", "shared_arguments"]


def shared_arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that training and testing have in common."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a file of configs/det or configs/seg")
    parser.add_argument("--work-dir", help="default: runs/mm/<name of the config>")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="overrides"
    )
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """The config with its overrides, its folder, and norms that the devices at hand can run.

    Raises:
        FileNotFoundError: no such config.
        ValueError: the parts of the model do not fit together, or a launcher that needs CUDA.
    """
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"runs/mm/{Path(args.config).stem}"
    cfg.launcher = args.launcher
    check_channels(cfg.model)
    if args.launcher == "none":
        without_sync_norm(cfg.model)
    elif not torch.cuda.is_available():
        _join_cpus(cfg, args.launcher)
    return cfg


def _join_cpus(cfg: Config, launcher: str) -> None:
    """Join the processes that torchrun started where there is no GPU.

    mmengine's own launchers would ask for one; it leaves a group alone that is there already.
    """
    if launcher != "pytorch" or "RANK" not in os.environ:
        raise ValueError(
            f"--launcher {launcher} needs CUDA here; on CPUs use --launcher none, or --launcher "
            "pytorch under torchrun"
        )
    without_sync_norm(cfg.model)
    cfg.sync_bn = None
    cfg.model_wrapper_cfg = dict(
        type="MMDistributedDataParallel", broadcast_buffers=False, device_ids=None
    )
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        atexit.register(torch.distributed.destroy_process_group)
