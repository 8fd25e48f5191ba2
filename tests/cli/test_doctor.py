"""What ``doctor`` finds, and the fixes that it names."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compiled_kernels import forget_kernels
from fresh_python import run_code

from backbones.cli import doctor
from backbones.cli.main import main
from backbones.core import requirements
from ops import cpu
from ops.cpu import build
from ops.cpu.build import folders
from ops.cpu.build.sources import Sources


def test_this_machine(capsys):
    status = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert status == int(any(f["severity"] == "error" for f in findings))
    topics = {f["topic"] for f in findings}
    assert topics >= {"python", "cpu", "gpu", "compiler", "attention", "openmmlab", "cache"}
    backends = [f["text"].split(":")[0] for f in findings if f["topic"] == "attention"]
    assert backends == ["reference", "tiled", "cpu", "triton", "natten"]


def test_the_report_names_fixes(monkeypatch, capsys):
    findings = [
        doctor.Finding("one", "ok", "good"),
        doctor.Finding("two", "error", "bad", "pip install x"),
        doctor.Finding("two", "warning", "slow"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert main(["doctor"]) == 1
    lines = ["✓ one  good", "✗ two  bad", "       → pip install x", "!      slow", ""]
    assert capsys.readouterr().out.splitlines() == [*lines, "1 error and 1 warning"]
    del findings[1]  # warnings are no errors
    assert main(["doctor"]) == 0


@pytest.mark.parametrize(
    ("versions", "gone", "kept"),
    [
        ("mmengine==0.10.7 onedl-mmengine==0.11.0", "mmengine onedl-mmengine", "mmengine==0.10.7"),
        ("mmcv==2.1.0 mmcv-lite==2.1.0", "mmcv mmcv-lite", "mmcv==2.1.0"),
        ("mmcv-lite==2.2.0 mmdet==3.3.0", "mmcv", "mmcv-lite==2.1.0"),
    ],
)
def test_conflicting_mm_packages(versions, gone, kept):
    findings = doctor.examine_mm(dict(word.split("==") for word in versions.split()))
    fixes = [finding.fix for finding in findings if finding.severity == "error"]
    assert f"pip uninstall -y {gone} && pip install {kept}" in fixes


def test_packages_that_lack_something(monkeypatch):
    (error,) = doctor.examine_mm({"mmengine": "0.10.7"}, has_pkg_resources=False)
    assert error.fix == "pip install 'setuptools<81'"
    found = doctor.examine_mm({"mmengine": "0.10.7", "mmcv-lite": "2.1.0"})
    assert [finding.severity for finding in found] == ["ok", "note"]
    monkeypatch.setattr(doctor, "_has_no_extension", lambda: True)
    (error,) = doctor.examine_mm({"mmcv": "2.1.0"})
    assert "no compiled operators" in error.text
    assert [finding.severity for finding in doctor.examine_mm({})] == ["note"]
    assert doctor.examine_export({"onnx": "1"})[0].fix == "pip install 'vision-backbones[export]'"
    monkeypatch.setattr(build.process, "sources", Sources(Path("/none")))
    (finding,) = doctor.examine_compiler()
    assert finding.severity == "warning" and "pip install --force-reinstall" in finding.fix


def test_unusable_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = doctor.examine_gpu()
    assert finding.severity == "error"
    assert finding.fix == "pip install --force-reinstall torch torchvision"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver" in doctor.examine_gpu()[0].text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: ((9, 0), (12, 0))[n])
    assert [finding.severity for finding in doctor.examine_gpu()] == ["ok", "error"]


def test_wrong_gradients_of_torch_are_named(monkeypatch):
    for wrong in (True, False):
        monkeypatch.setattr(doctor, "has_wrong_gradients", lambda wrong=wrong: wrong)
        assert [finding.severity for finding in doctor.examine_gradients()] == ["note"] * wrong


@pytest.mark.parametrize(
    ("reason", "compiler", "variable", "fix"),
    [
        ("no C++ compiler found", None, None, "pip install ziglang"),
        ("no C++ compiler found", None, ("VISION_BACKBONES_NATIVE", "0"), "unset {}"),
        ("no C++ compiler found", None, ("CXX", "no-such-compiler"), "unset {}"),
        ("c++ failed: ", "/usr/bin/c++", None, "sudo apt-get install --reinstall g++"),
        ("c++ failed: ", "/usr/bin/c++", ("CXX", "clang++"), "unset {}"),
        (None, "/usr/bin/c++", ("CXX", "g++ 'x"), "unset {}"),  # no closing quotation
    ],
)
def test_fixes_of_compilers(reason, compiler, variable, fix, monkeypatch):
    monkeypatch.setattr(cpu, "unavailable_reason", lambda name: reason)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    if variable is not None:
        monkeypatch.setenv(*variable)
    found = {finding.fix: finding for finding in doctor.examine_compiler() if finding.fix}
    assert found[fix.format(*(variable or ()))].severity == "warning"
    said = "".join(finding.text for finding in found.values())
    assert reason is None or "not compiled: " in said and "gemm, " in said


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where kernels are kept if the cache will not do."""
    (tmp_path / "lasting").mkdir()
    monkeypatch.setattr(folders, "_PERSISTENT", tmp_path / "lasting")
    return tmp_path / "lasting" / f"vision-backbones-{os.geteuid()}" / "native"


def _open_to_all(folder: Path, patch: pytest.MonkeyPatch) -> str:
    native = folder / "two words" / "native"
    native.mkdir(parents=True)
    native.chmod(0o777)
    patch.setenv("VISION_BACKBONES_CACHE_DIR", str(native.parent))
    return f"others may write to {str(native)!r} (mode 777)"


def _no_folder(folder: Path, patch: pytest.MonkeyPatch) -> str:
    (folder / "file").touch()
    patch.setenv("VISION_BACKBONES_CACHE_DIR", str(folder / "file" / "below"))
    return str(folder / "file")


def _no_home(folder: Path, patch: pytest.MonkeyPatch) -> str:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("VISION_BACKBONES_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", unknown)
    return "there is no home"


@pytest.mark.parametrize("spoil", [_open_to_all, _no_folder, _no_home])
def test_what_is_said_mends_an_unusable_cache(spoil, private, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    told = spoil(tmp_path, monkeypatch)
    kernels, weights = doctor.examine_caches()
    assert kernels.severity == "warning" and told in kernels.text
    assert f"they are cached in {private}" in kernels.text
    assert weights.severity in ("ok", "warning") and not (tmp_path / "torch").exists()
    if kernels.fix.startswith("export "):
        name, _, folder = kernels.fix.removeprefix("export ").partition("=")
        monkeypatch.setenv(name, shlex.split(folder)[0])
    else:
        subprocess.run(["sh", "-c", kernels.fix], check=True)
    assert doctor.examine_caches()[0].severity == "ok"


def test_a_full_disk(monkeypatch, tmp_path):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage(9, 9, 1000))
    weights = doctor.examine_caches()[1]
    assert (weights.severity, "0.0 GB free" in weights.text) == ("warning", True)
    assert weights.fix.startswith("export TORCH_HOME=")


def test_packages_that_are_missing_or_old(monkeypatch):
    real, versions = requirements.installed_version, {"pyyaml": None, "timm": "0.9.0"}
    found = lambda name: versions[name] if name in versions else real(name)  # noqa: E731
    monkeypatch.setattr(requirements, "installed_version", found)
    errors = [f for f in doctor.examine_packages({}) if f.severity == "error"]
    assert {error.text: error.fix for error in errors} == {
        "timm>=1.0.31 is needed, found: 0.9.0": "pip install 'timm>=1.0.31'",
        "pyyaml>=6 is needed, found: nothing": "pip install 'pyyaml>=6'",
    }
    said = requirements.explanation(ImportError("no module"))
    assert said is not None and "timm>=1.0.31 (found: 0.9.0)" in said and ": no module. Run" in said
    assert said.endswith(" `pip install 'pyyaml>=6' 'timm>=1.0.31'`.")


def test_an_import_that_fails_says_what_to_install(tmp_path):
    """As one of timm with a torchvision of another torch does."""
    before = "import sys; del sys.modules['timm']; sys.path[:0] = [sys.argv[1]]"
    (tmp_path / "timm.py").write_text("raise RuntimeError('torchvision::nms is not there')")
    with pytest.raises(AssertionError, match="ended with 1\n") as raised:
        run_code(f"{before}; import backbones.cli.main", tmp_path, tmp_path)
    last = str(raised.value).splitlines()[-1]
    assert "torchvision::nms is not there" in last
    assert "`pip install --force-reinstall torch torchvision timm`" in last


@pytest.mark.parametrize("required", ["torch==2.9.0", 'torch (==2.9.0); python_version > "3"'])
def test_a_torchvision_of_another_torch(required, monkeypatch):
    import torchvision.ops

    def broken(*args: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["numpy", required])
    *_, finding = doctor.examine_packages({"torchvision": "0.24.0+cpu"})
    assert finding.severity == "error"
    assert finding.fix == "pip install --force-reinstall torch==2.9.0 torchvision==0.24.0"


def test_invalid_variables(monkeypatch, capsys):
    forget_kernels(monkeypatch)
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "maybe")
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    errors = [f["fix"] for f in found if f["severity"] == "error"]
    assert "unset VISION_BACKBONES_NATIVE" in errors
    monkeypatch.setenv("VISION_BACKBONES_NATIVE", "False")
    (finding,) = doctor.examine_cpu()
    assert finding.severity != "error" and "switched off" in finding.text
