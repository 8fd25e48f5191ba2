"""Run Python code in processes that have not imported the library, but torch and timm."""

from __future__ import annotations

import atexit
import functools
import tempfile
from pathlib import Path

from clones import ROOT, Workshop


def run_code(code: str, folder: Path, *arguments: str | Path) -> str:
    """Run code in a process of its own, and return its output on both streams.

    The process is forked from one that has imported timm, and thereby torch, which would take most
    of the time. It imports the library from this checkout.

    Args:
        folder: for the code; the working directory.
        arguments: ``sys.argv[1:]``.

    Raises:
        AssertionError: it failed; the message ends with its output.
    """
    path = folder / "code.py"
    path.write_text(code)
    return run_program(*map(str, (path, *arguments)), folder=folder)


def run_program(*words: str, folder: Path) -> str:
    """Like :func:`run_code`, for a command line after ``python``."""
    return _workshop().run(words, folder, seconds=120)


@functools.cache
def _workshop() -> Workshop:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    workshop = Workshop(ROOT, ["timm"], Path(folder.name) / "log")
    atexit.register(workshop.close)
    return workshop
