"""Shared by the tools for mmdet and mmseg: arguments, config, data, process groups."""

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

from backbones.common.arguments import nonempty
from backbones.common.outputs import overwritten
from backbones.common.processes import leave_processes
from backbones.openmmlab import check_channels, without_sync_norm


def shared_arguments(description: str) -> argparse.ArgumentParser:
    """The common arguments of training and testing."""
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
    """The config with overrides, work folder, and norms that the available devices support."""
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or f"runs/mm/{Path(args.config).stem}"
    dumped = Path(cfg.work_dir) / Path(args.config).name  # written by mmengine
    if overwritten([dumped], [args.config]) is not None:
        raise ValueError(f"{args.config} would be overwritten: give another --work-dir")
    cfg.launcher = args.launcher
    check_channels(cfg.model)
    if args.launcher == "none":
        without_sync_norm(cfg.model)
    elif not torch.cuda.is_available():
        _for_cpus(cfg, args.launcher)
    return cfg


def _for_cpus(cfg: Config, launcher: str) -> None:
    """Adjust the config of a multi-process run without GPUs."""
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
    """Create the config's ``quickstart_data``, unless it exists or no ``files`` in it are read."""
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
            f"{folder} needs {error.name}, which is missing: pip install '.[mm]'"
        ) from None
    make_once(folder, data.train, data.val)


@contextmanager
def processes(cfg: Config) -> Iterator[None]:
    """Create the process group for processes that torchrun started without GPUs.

    mmengine's launchers require a GPU, but reuse an existing group. ``env_cfg.dist_cfg.timeout`` is
    in seconds, as there. With a GPU, or a single process, this does nothing.
    """
    if cfg.launcher == "none" or torch.cuda.is_available() or distributed.is_initialized():
        yield
        return
    seconds = cfg.get("env_cfg", {}).get("dist_cfg", {}).get("timeout")
    distributed.init_process_group("gloo", timeout=seconds and timedelta(seconds=seconds))
    try:
        yield
        # The first process to finish would close connections that the others still use.
        distributed.barrier()
    finally:
        # Before the interpreter shuts down while the group's threads are running.
        leave_processes()
