"""Run the cases of Triton kernels: on the GPU or, where there is none, interpreted.

Triton decides on its first import whether it interprets. So the cases run in processes of their
own; the interpreted ones are forked from one that has imported everything, for all kernels.
"""

from __future__ import annotations

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from clones import ROOT, Workshop

_OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout")
_LIBRARY = (
    "ops.bi_wkv",
    "ops.linear_attention",
    "ops.neighborhood",
    "ops.selective_scan",
    "triton",
)


def run_cases(cases: Path, folder: Path, *options: str, **variables: str) -> None:
    """Run the tests of a file by pytest.

    Args:
        cases: the file.
        folder: the working directory.
        options: further ones of pytest.
        variables: further environment variables.
    """
    words = ["-m", "pytest", str(cases), *_OPTIONS, *options]
    if torch.cuda.is_available():
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env={**_environment(), **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        said = done.stdout
    else:
        said = _workshop().run(words, folder, seconds=3600, env=variables)
    assert " passed" in said


def _environment() -> dict[str, str]:
    # What an outer pytest leaves in the environment is not meant for an inner one.
    outer = ("PYTEST", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    # Other plugins take long to import, or refuse to follow modules that they would rewrite.
    return {**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@functools.cache
def _workshop() -> Workshop:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    environment = {**_environment(), "TRITON_INTERPRET": "1"}
    workshop = Workshop(ROOT, _LIBRARY, Path(folder.name) / "log", environment)
    atexit.register(workshop.close)
    return workshop
