"""What a wheel needs to be built, and where its kernels are kept; test_wheel.py builds one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

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


def test_kernels_of_a_read_only_checkout(tmp_path):
    spec = importlib.util.spec_from_file_location("hook", ROOT / "tools" / "wheel_hook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    warnings: list[str] = []
    app = SimpleNamespace(display_warning=warnings.append)
    hook = module.CompiledKernels(str(tmp_path), {}, None, None, "", "wheel", app)
    (tmp_path / "build").touch()  # no folder can be made there, by root neither
    folder = hook._folder()
    assert folder.is_dir() and not folder.is_relative_to(tmp_path / "build")
    assert "not kept for the next build: " in warnings[0] and str(tmp_path) in warnings[0]
    hook.finalize("standard", {}, "x.whl")
    assert not folder.exists()
