"""Embed parts on a Ray cluster, which schedules and retries them, each as one of its tasks.

Ray Data is not used: its executor looks for finished tasks only ten times a second. Only
descriptions of parts and their results are sent over the network: each machine reads the source and
writes its shards itself, so all of them must see both under the same paths.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

import torch

from backbones.common.errors import MendableError, required
from backbones.common.messages import first_line
from backbones.embedding.worker import Event, Job, Worker

# Tasks submitted at a time: two for each of 2000 cores. More would only take memory.
_MOST_TASKS = 4000
# Give up on a part after its process or its machine was lost so often.
_MOST_RETRIES = 10

# The worker of this process, kept because Ray runs many tasks of a job in one process.
_worker: tuple[Job, Worker] | None = None


def require_ray() -> Any:
    """Import ``ray``, an optional dependency."""
    return required("ray", "--engine ray")


def run_on_cluster(
    job: Job, address: str | None, parts: Iterable[tuple[int, Any]]
) -> Generator[Event, None, None]:
    """Embed with Ray: one task per part, on a core or, if ``job`` says so, a GPU.

    If a machine is lost, the others take over its tasks. ``address`` is that of ``ray.init``; None
    starts a cluster on this machine.
    """
    ray = require_ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, address)
    needs = {"num_cpus": 1} if job.device == "cpu" else {"num_gpus": 1}
    task = ray.remote(max_retries=_MOST_RETRIES, **needs)(_embed)
    remaining = iter(parts)
    running: list[Any] = []
    try:
        sent = ray.put(job)
        running += [task.remote(sent, part) for part in islice(remaining, _MOST_TASKS)]
        while running:
            finished, running = ray.wait(running)
            event: Event = ray.get(finished[0])
            if event.error:
                raise MendableError(event.error)
            running += [task.remote(sent, part) for part in islice(remaining, 1)]
            yield event
    except ray.exceptions.RayError as error:
        raise MendableError(f"Ray gave up: {first_line(error)}") from error
    finally:
        for reference in running:
            ray.cancel(reference)
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


def _embed(job: Job, numbered: tuple[int, Any]) -> Event:
    """Embed a part, on a machine of the cluster."""
    global _worker
    number, part = numbered
    try:
        if _worker is None or _worker[0] != job:
            torch.set_num_threads(1 if job.device == "cpu" else os.cpu_count() or 1)
            _worker = job, Worker(job)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damage that affects no pixel
            *_, last = _worker[1](number, part)
            return last
    except (MendableError, OSError, ValueError) as error:
        return Event(number, error=first_line(error))
