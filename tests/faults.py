"""Faults of a machine and of files, for tests of what a program says then."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def files_that_may_not_grow(beyond: int) -> Iterator[None]:
    """Within the block, as pytest writes outside it, files cannot exceed so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (beyond, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Malicious:
    """Pickles as a call of ``eval``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1/0",)
