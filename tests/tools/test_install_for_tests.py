""".ci/install_for_tests installs where it need not ask, and never fails."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from clones import ROOT

_BROWSER = ["update", "install chromium", "install chromium-driver"]


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
        ({"apt-get": None}, []),
    ],
)
def test_what_is_installed(programs, asked, tmp_path):
    """On a machine whose programs are few, and whose apt-get only writes what it is asked."""
    log = tmp_path / "log"
    log.touch()
    for name in ("sh", "env", "ls"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    for name, text in ({"id": "echo 0", "apt-get": 'echo "$*" >>{log}'} | programs).items():
        if text is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\n{text.replace('{log}', str(log))}\n")
            (tmp_path / name).chmod(0o755)
    words = [ROOT / ".ci" / "install_for_tests", "browser"]
    subprocess.run(words, env={"PATH": str(tmp_path)}, check=True, timeout=60)
    lines = [line.split() for line in log.read_text().splitlines()]
    lines = [line for line in lines if "-y" in line or "install" not in line]
    found = [f"install {line[-1]}" if "install" in line else line[-1] for line in lines]
    assert found == asked
