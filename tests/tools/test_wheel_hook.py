"""What a wheel needs to be built, and where its kernels are kept; test_wheel.py builds one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from clones import ROOT

# As pip asks it in an environment with hatchling alone.
_REQUIRED = """
import sys
if sys.argv[1] == "without":
    sys.modules["ziglang"] = None
from hatchling.build import get_requires_for_build_wheel
print(get_requires_for_build_wheel())
"""


@pytest.mark.parametrize(
    ("ziglang", "programs", "switch", "required"),
    [
        ("without", [], "1", "['ziglang>=0.17']"),
        ("with", [], "1", "[]"),
        ("without", ["g++"], "1", "[]"),
        ("without", [], "0", "[]"),
    ],
)
def test_ziglang_is_required_where_there_is_no_compiler(
    ziglang, programs, switch, required, tmp_path
):
    for name in programs:
        (tmp_path / name).touch(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH")}
    environment |= {"PATH": str(tmp_path), "VISION_BACKBONES_NATIVE": switch}
    words = [sys.executable, "-c", _REQUIRED, ziglang]
    said = subprocess.check_output(words, cwd=ROOT, env=environment, text=True, timeout=60)
    assert said == f"{required}\n"
