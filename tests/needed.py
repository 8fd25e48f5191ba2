"""Debian packages that some tests need; tests of those that are missing are left out.

``.ci/install_for_tests`` installs them. A test needs the browser if it has that fixture, the
others by its mark, ``@pytest.mark.needs("emulator")``.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DRIVER = "chromedriver"


def browser() -> str | None:
    """The program."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def libomp() -> Path | None:
    """The library of LLVM's OpenMP runtime."""
    return next(Path("/usr/lib").glob("llvm-*/lib/libomp.so.5"), None)


# By the names of the needs: what to install, and what finds it.
_PACKAGES: dict[str, tuple[str, Callable[[], Any]]] = {
    "browser": ("chromium chromium-driver", lambda: browser() and shutil.which(DRIVER)),
    "arm_compiler": ("g++-aarch64-linux-gnu", lambda: shutil.which(ARM_COMPILER)),
    "emulator": ("qemu-user", lambda: shutil.which(EMULATOR)),
    # Which runs what the CPU can run.
    "wine": ("wine", lambda: platform.machine() == "x86_64" and shutil.which("wine")),
    "libomp": ("libomp5", libomp),
}


def missing(item: pytest.Item) -> str:
    """The packages that a test needs and that are missing, separated by spaces."""
    needs = {name for mark in item.iter_markers("needs") for name in mark.args}
    needs |= {"browser"} & set(getattr(item, "fixturenames", ()))
    return " ".join(
        packages for name, (packages, find) in _PACKAGES.items() if name in needs and not find()
    )
