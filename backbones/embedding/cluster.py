"""Embed parts on a Ray cluster, which schedules and retries them.

Only descriptions of parts and their results are sent over the network. Each machine reads the
source and writes its shards itself, so all of them must see both under the same paths (NFS, a
shared volume).
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from backbones.core.console import MendableError
from backbones.core.messages import first_line
from backbones.embedding.worker import Event, Job, Worker

__all__ = ["require_ray", "run_on_cluster"]

# Most tasks that Ray is given; if there are more parts, a task covers several.
_MOST_TASKS = 100_000

# The worker of this process, kept because Ray runs many tasks of a job in one process.
_worker: tuple[Job, Worker] | None = None


def require_ray() -> Any:
    """Import ``ray`` with ``ray.data``, an optional dependency.

    Raises:
        MendableError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise MendableError("--engine ray needs Ray: pip install 'ray[data]'") from None
    return ray


def run_on_cluster(
    job: Job, address: str | None, parts: Iterable[tuple[int, Any]]
) -> Iterator[Event]:
    """Embed with Ray Data: one task per part, on a core or, if ``job`` says so, a GPU.

    If a machine is lost, the others take over its tasks.

    Args:
        address: of the cluster, as for ``ray.init``; None starts one on this machine.

    Raises:
        MendableError: Ray is not installed or unreachable, or a worker cannot continue.
    """
    ray = require_ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, address)
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False  # we show our own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    needs = {"num_cpus": 1} if job.device == "cpu" else {"num_gpus": 1}
    orders = [{"order": pickle.dumps(part)} for part in parts]
    try:
        tasks = ray.data.from_items(orders, override_num_blocks=min(len(orders), _MOST_TASKS))
        for row in tasks.map(_embed, fn_kwargs={"job": job}, **needs).iter_rows():
            event = pickle.loads(row["event"])
            if event.error:
                raise MendableError(event.error)
            yield event
    except ray.exceptions.RayError as error:
        raise MendableError(f"Ray gave up: {first_line(error)}") from error
    finally:
        context.enable_progress_bars = before
        if started:
            ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would retry for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(
            address=address,
            log_to_driver=False,
            include_dashboard=False if address is None else None,
            logging_level=logging.ERROR,
        )
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise MendableError(
            f"--address {address}: there is no Ray cluster to join ({first_line(error)}); "
            "`ray start --head` starts one"
        ) from error


def _embed(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """Embed the parts of a task, on a machine of the cluster."""
    global _worker
    number, part = pickle.loads(row["order"])
    rows = 0
    corrupt: list[tuple[str, str]] = []
    try:
        if _worker is None or _worker[0] != job:
            torch.set_num_threads(1 if job.device == "cpu" else os.cpu_count() or 1)
            _worker = job, Worker(job)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damage that affects no pixel
            for event in _worker[1](number, part):
                rows += event.rows
                corrupt += event.corrupt
    except (MendableError, OSError, ValueError) as error:
        return {"event": pickle.dumps(Event(number, error=first_line(error)))}
    return {"event": pickle.dumps(Event(number, rows, tuple(corrupt), done=True))}
