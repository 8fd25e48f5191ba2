"""What Windows lacks is not needed: modules, functions and signals of Unix."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulators import windows_compiler
from fresh_python import run_code
from without_unix import WITHOUT_UNIX

from ops.cpu import instruction_sets
from ops.cpu.build import compiler
from ops.cpu.build.sources import Sources, suffix

_FUSED = """
import torch
import backbones
from ops import cpu
torch.manual_seed(0)
model = backbones.create_model("shvit_s1").eval()
image = torch.randn(1, 3, 64, 64)
with torch.inference_mode():
    expected = model(image)
    out = backbones.fuse(model)(image)
torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
assert cpu.status("gemm").library is not None, cpu.unavailable_reason("gemm")
"""
_COMPILED = """
from pathlib import Path
from ops.cpu import build
from ops.cpu.build import folders
from ops.cpu.build.sources import Sources
os.environ["VISION_BACKBONES_CACHE_DIR"] = sys.argv[1]
build.process = build.Libraries(Sources(Path(sys.argv[1])))
assert build.load("small").answer() == 42, build.unavailable_reason("small")
assert build.status("small").path.parent == build.cache_dir()
assert folders.candidates()[1].name == "native"
"""


def test_a_fused_model_without_what_windows_lacks(tmp_path: Path) -> None:
    run_code(WITHOUT_UNIX + _FUSED, tmp_path)


def test_compiling_without_what_windows_lacks(tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
    run_code(WITHOUT_UNIX + _COMPILED, tmp_path, tmp_path)


def test_libraries_of_systems_differ() -> None:
    sources = Sources()
    stems = {sources.stem("norm", "portable", "x86_64", s) for s in ("linux", "win32", "darwin")}
    assert len(stems) == 3
    assert [suffix(s) for s in ("linux", "win32", "darwin")] == [".so", ".dll", ".so"]


def test_compilers_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not any on the path: GCC misaligns vectors there."""
    words = windows_compiler()
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name)
    monkeypatch.setattr(compiler.sys, "platform", "win32")
    monkeypatch.setattr(instruction_sets, "machine", lambda: "x86_64")
    (found,) = compiler.find_compilers([])
    assert found[-1] == words[-1] == "x86_64-windows-gnu"
    assert compiler.find_compilers(["my-c++"])[0] == ["my-c++"]
