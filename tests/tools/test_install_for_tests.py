"""tools/install_for_tests.sh installs where it need not ask, and never fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from clones import ROOT

_BROWSER = ["update", "install chromium", "install chromium-driver"]


class Machine:
    """A machine whose programs are few, and whose apt-get only writes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "bin", folder / "log"
        self.folder.mkdir()
        self.log.touch()
        for name in ("sh", "env", "ls"):
            (self.folder / name).symlink_to(str(shutil.which(name)))
        self.has("id", "echo 0")
        self.has("apt-get", f'echo "$*" >>{self.log}')

    def has(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.folder / name).chmod(0o755)

    def run(self, *needs: str) -> list[str]:
        """What was asked of apt-get."""
        words = [ROOT / "tools" / "install_for_tests.sh", *needs]
        subprocess.run(words, env={"PATH": str(self.folder)}, check=True, timeout=60)
        asked = [line.split() for line in self.log.read_text().splitlines()]
        return [
            f"install {words[-1]}" if "install" in words else words[-1]
            for words in asked
            if "-y" in words or "install" not in words
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_nothing_without_apt(machine):
    (machine.folder / "apt-get").unlink()
    assert machine.run("browser") == []


@pytest.mark.parametrize(
    ("programs", "asked"),
    [
        ({}, _BROWSER),  # as root
        ({"id": "echo 1000", "sudo": '[ "$1" = -n ] && shift && exec "$@"', "true": ""}, _BROWSER),
        ({"id": "echo 1000"}, []),  # a password would be asked
        ({"id": "echo 1000", "sudo": "exit 1"}, []),
        ({"chromium": ""}, ["update", "install chromium-driver"]),
        ({"chromium": "", "chromedriver": ""}, []),
        ({"apt-get": 'echo "$*" >>{log}; exit 100'}, _BROWSER),
    ],
)
def test_what_is_installed(programs, asked, machine):
    for name, text in programs.items():
        machine.has(name, text.replace("{log}", str(machine.log)))
    assert machine.run("browser") == asked
