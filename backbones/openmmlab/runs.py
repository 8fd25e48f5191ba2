"""What the tools for mmdet and mmseg share: arguments, the config they make, data, processes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from torch import distributed

from backbones.core.arguments import nonempty
from backbones.openmmlab import check_channels, without_sync_norm
from backbones.training.distributed import leave_processes

__all__ = ["load_config", "processes", "provide_data", "shared_arguments"]


def shared_arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that training and testing have in common."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=nonempty, help="a file of configs/det or configs/seg")
    parser.add_argument("--work-dir", type=nonempty, help="default: runs/mm/<name of the config>")
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
        _for_cpus(cfg, args.launcher)
    return cfg


def _for_cpus(cfg: Config, launcher: str) -> None:
    """What a run of several processes has otherwise where there is no GPU."""
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


def provide_data(cfg: Config, files: Iterable[Path] | None = None) -> None:
    """Make the set that a config names as its ``quickstart_data``, if it is not there.

    Args:
        files: those that will be read, where that is not the whole set.

    Raises:
        FileNotFoundError: a package is missing that the set is made with.
        ValueError: a number of images below 1.
    """
    data = cfg.get("quickstart_data")
    if data is None:
        return
    folder = Path(data.folder)
    if files is not None and not any(folder.resolve() in f.resolve().parents for f in files):
        return
    try:
        from backbones.openmmlab.quickstart import make_once
    except ImportError as error:
        raise FileNotFoundError(
            f"{folder} is made with {error.name}, which is missing: pip install '.[mm]'"
        ) from None
    make_once(folder, data.train, data.val)


@contextmanager
def processes(cfg: Config) -> Iterator[None]:
    """Within it, the processes that torchrun started without a GPU are a group.

    mmengine's own launchers would ask for a GPU; they leave a group alone that is there already.
    ``env_cfg.dist_cfg.timeout`` is in seconds, as theirs. Where there is a GPU, or one process,
    nothing is done here.
    """
    if cfg.launcher == "none" or torch.cuda.is_available() or distributed.is_initialized():
        yield
        return
    seconds = cfg.get("env_cfg", {}).get("dist_cfg", {}).get("timeout")
    distributed.init_process_group("gloo", timeout=seconds and timedelta(seconds=seconds))
    try:
        yield
        # Who is done first would cut the connections that the others still use.
        distributed.barrier()
    finally:
        # Before the interpreter ends, which takes its threads by surprise.
        leave_processes()
