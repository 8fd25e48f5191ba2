"""``vision-backbones doctor``: diagnose this machine and suggest fixes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from packaging.requirements import Requirement
from packaging.version import Version

from backbones.common.messages import first_line
from backbones.common.outputs import json_text
from backbones.core.requirements import installed_version, unmet
from ops import cpu
from ops.batch_norm import has_wrong_gradients
from ops.cpu import build
from ops.cpu.build import compiler, folders, openmp
from ops.cpu.build.folders import Problem, shell_word
from ops.cpu.build.libraries import cores
from ops.neighborhood import BACKENDS, NAParams
from ops.neighborhood._geometry import Inputs

EXAMPLE = ""

_MARKS = {"ok": "✓", "note": "·", "warning": "!", "error": "✗"}
_PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "triton", "natten"),
    *("mmengine", "onedl-mmengine", "mmcv", "mmcv-lite", "onedl-mmcv", "mmdet", "mmsegmentation"),
    *("onnx", "onnxscript", "onnxruntime"),
)
# Of OpenMMLab's packages, those that own the same folder.
_SAME_FOLDER = (
    *(("mmengine", "onedl-mmengine"), ("mmcv", "mmcv-lite"), ("mmcv", "onedl-mmcv")),
    ("mmcv-lite", "onedl-mmcv"),
)
_SCARCE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Finding:
    """The result of one check, and the command that fixes it ("" if there is nothing to fix)."""

    topic: str
    severity: str  # note: no action needed; warning: slow or missing; error: something will fail
    text: str
    fix: str = ""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: Namespace) -> int:
    """Run ``doctor``; 1 if something will fail."""
    findings = examine()
    if options.json:
        sys.stdout.write(json_text({"findings": [asdict(finding) for finding in findings]}))
    else:
        sys.stdout.write(_report(findings))
    return int(any(finding.severity == "error" for finding in findings))


def examine() -> list[Finding]:
    """Run all checks."""
    versions = {name: v for name in _PACKAGES if (v := installed_version(name)) is not None}
    findings = examine_packages(versions)
    cpu = examine_cpu()
    findings += cpu + examine_gradients() + examine_gpu()
    # Building kernels fails for an invalid instruction set, which is reported once.
    if all(finding.severity != "error" for finding in cpu):
        findings += examine_compiler() + examine_attention()
    findings += examine_mm(versions, importlib.util.find_spec("pkg_resources") is not None)
    return findings + examine_export(versions) + examine_caches()


def examine_packages(versions: Mapping[str, str]) -> list[Finding]:
    """Whether the required packages are installed in compatible versions."""
    shown = ", ".join(f"{name} {versions[name]}" for name in _PACKAGES[:6] if name in versions)
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    for package in unmet():
        text = f"{package.requirement} is needed, found: {package.found or 'nothing'}"
        findings.append(Finding("packages", "error", text, package.fix))
    if len(findings) == 1:
        findings.append(Finding("packages", "ok", shown))
    return findings + _torchvision(versions)


def _torchvision(versions: Mapping[str, str]) -> list[Finding]:
    """Whether torchvision's operators run on torch's device: one may be a build without CUDA."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torchvision.ops.nms(torch.zeros(1, 4, device=device), torch.zeros(1, device=device), 0.5)
    except RuntimeError as error:
        required = map(Requirement, importlib.metadata.requires("torchvision") or ())
        pinned = next((f"torch{r.specifier}" for r in required if r.name == "torch"), "torch")
        own, torchs = versions.get("torchvision"), versions.get("torch")
        text = f"torchvision {own} does not match torch {torchs}: {first_line(error)}"
        version = (own or "").partition("+")[0]
        fix = f"pip install --force-reinstall {shlex.quote(pinned)} torchvision=={version}"
        return [Finding("packages", "error", text, fix)]
    return []


def examine_cpu() -> list[Finding]:
    """Instruction set, cores and threads."""
    threads = torch.get_num_threads()
    onednn = "with" if torch.backends.mkldnn.is_available() else "without"
    text = (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, cores: {cores()}, "
        f"threads: {threads}, torch {onednn} oneDNN"
    )
    try:
        text += f", kernels for {cpu.instruction_set()}"
        text += "" if cpu.is_switched_on() else ", but switched off"
    except ValueError as error:  # which begins with the variable's name
        return [Finding("cpu", "error", str(error), f"unset {str(error).split()[0]}")]
    if threads > cores():
        fix = f"export OMP_NUM_THREADS={cores()}"
        return [Finding("cpu", "warning", f"{text}: more threads than cores slow it down", fix)]
    return [Finding("cpu", "ok", text)]


def examine_gpu() -> list[Finding]:
    """Whether torch can use the GPU, if there is one."""
    present = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    reinstall = "pip install --force-reinstall torch torchvision"
    build = torch.version.cuda
    if torch.version.hip is not None:
        text = f"torch for ROCm {torch.version.hip}; the kernels need CUDA"
        return [Finding("gpu", "note", text)]
    if build is not None and torch.cuda.is_available():
        return [_examine_gpu(n, build, reinstall) for n in range(torch.cuda.device_count())]
    if not present:
        made = f"torch {torch.__version__} is for " + (f"CUDA {build}" if build else "the CPU")
        return [Finding("gpu", "note", f"none, and {made}")]
    if build is None:
        text = f"there is an NVIDIA GPU, but torch {torch.__version__} is a build without CUDA"
        return [Finding("gpu", "error", text, reinstall)]
    text = f"torch for CUDA {build} cannot use the GPU: its driver is too old or not running"
    return [Finding("gpu", "error", text, "nvidia-smi  # its driver must be as new as CUDA")]


def _examine_gpu(number: int, build: str, reinstall: str) -> Finding:
    major, minor = torch.cuda.get_device_capability(number)
    text = f"{torch.cuda.get_device_name(number)}, sm_{major}{minor}, CUDA {build}"
    known = [name for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    if known and not any(name.startswith(f"sm_{major}") for name in known):
        text += f": this torch was built for {', '.join(known)} only"
        return Finding("gpu", "error", text, reinstall)
    return Finding("gpu", "ok", text)


def examine_gradients() -> list[Finding]:
    """Whether torch's batch norm has wrong gradients on CPUs, see :mod:`ops.batch_norm`."""
    if not has_wrong_gradients():
        return []
    text = (
        f"torch {torch.__version__}: on a CPU the gradients of nn.BatchNorm2d are wrong for a "
        "batch of one followed by flattening to tokens (seen in 2.7, 2.8 and 2.13 to 2.15); this "
        "library's layers are not affected, but the authors' code and your own heads may be"
    )
    return [Finding("torch", "note", text)]


def examine_compiler() -> list[Finding]:
    """Whether the C++ kernels are available."""
    findings = []
    command: list[str] = []
    try:
        command = compiler.command()
    except compiler.CompilerError as error:
        findings.append(Finding("compiler", "warning", str(error), "unset CXX"))
    try:
        found = compiler.label(compiler.find_compilers(command)[0])
    except compiler.NoCompilerError:
        found = None
    if command and shutil.which(command[0]) is None:
        text = f"CXX names {command[0]!r}, which does not exist"
        findings.append(Finding("compiler", "warning", text, "unset CXX"))
    names = sorted(build.process.sources.all())
    reasons = {name: cpu.unavailable_reason(name) for name in names}
    missing = sorted({reason for reason in reasons.values() if reason is not None})
    for reason in missing:
        without = ", ".join(name for name in names if reasons[name] == reason)
        if not cpu.is_switched_on():
            fix = "unset VISION_BACKBONES_NATIVE"
        elif found is not None and usable_kernel_cache() is None:
            fix = kernel_cache_fix()
        elif found is not None and command:
            fix = "unset CXX"
        elif found is not None and sys.platform == "linux":
            fix = "sudo apt-get install --reinstall g++"
        else:
            fix = "pip install --force-reinstall ziglang" if found else "pip install ziglang"
        text = f"not compiled: {without}; slower paths are used: {reason}"
        findings.append(Finding("compiler", "warning", text, fix))
    if not names:
        text = f"the kernels' sources are missing below {str(build.process.sources.root)!r}"
        fix = "pip install --force-reinstall --no-deps vision-backbones"
        findings.append(Finding("compiler", "warning", text, fix))
    elif not missing:
        findings.append(Finding("compiler", "ok", f"{found or 'none'}; {_kernels(names)}"))
    return findings


def _kernels(names: Sequence[str]) -> str:
    """The available kernels with their instruction sets, locations and OpenMP runtime."""
    locations: dict[str, list[str]] = {}
    for name in names:
        kernel = cpu.status(name)
        folder = kernel.path.parent if kernel.path is not None else Path()
        place = "the package" if folder == build.process.shipped else shell_word(folder)
        locations.setdefault(f"for {kernel.instruction_set} from {place}", []).append(name)
    kinds = (f"{len(those)} of {len(names)} kernels {kind}" for kind, those in locations.items())
    runtime = openmp.runtime()
    threads = f", on the threads of torch's {runtime.name}" if runtime is not None else ""
    return ", ".join(kinds) + threads


def examine_attention() -> list[Finding]:
    """Which neighborhood attention backends support an ordinary call, and why others don't."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.zeros(1, 14, 14, 2, 32, device=device)
    params = NAParams((7, 7), (1, 1), (1, 1), (False, False), 32**-0.5, False)
    findings = []
    for name, backend in BACKENDS.items():
        reason = backend.unavailable(Inputs(query, query, query), params)
        if reason is None:
            findings.append(Finding("attention", "ok", f"{name}: usable on {device}"))
            continue
        # Triton's kernels need a GPU before they need the package.
        missing = "not installed" in reason and (name != "triton" or device == "cuda")
        fix = f"pip install {name}" if missing else ""
        reason = reason.partition(";")[0] if fix else reason  # which names the command too
        findings.append(Finding("attention", "note", f"{name}: {reason}", fix))
    return findings


def examine_mm(versions: Mapping[str, str], has_pkg_resources: bool = True) -> list[Finding]:
    """Whether OpenMMLab's packages are compatible."""
    found: list[Finding] = []

    def add(severity: str, text: str, fix: str = "") -> None:
        found.append(Finding("openmmlab", severity, text, fix))

    lite = "pip uninstall -y mmcv && pip install mmcv-lite==2.1.0"
    for kept, other in _SAME_FOLDER:
        if kept in versions and other in versions:
            # Both own the same folder: removing one takes files of the other away.
            text = f"{kept} and {other} install into the same folder and break each other"
            fix = f"pip uninstall -y {kept} {other} && pip install {kept}=={versions[kept]}"
            add("error", text, fix)
    mmcv = versions.get("mmcv") or versions.get("mmcv-lite")
    if "mmdet" in versions and mmcv is not None and Version(mmcv) >= Version("2.2"):
        text = f"mmdet {versions['mmdet']} does not accept mmcv {mmcv}: install one before 2.2.0"
        add("error", text, lite)
    if "mmengine" in versions and not has_pkg_resources:
        text = f"mmengine {versions['mmengine']} needs pkg_resources, which newer setuptools lack"
        add("error", text, "pip install 'setuptools<81'")
    if "mmcv" in versions and _has_no_extension():
        add("error", f"mmcv {versions['mmcv']} has no compiled operators (mmcv._ext)", lite)
    if not found:
        mm = [name for name in _PACKAGES if name.startswith(("mm", "onedl")) and name in versions]
        if not mm:
            text = "not installed: mmdet and mmseg need it"
            return [Finding("openmmlab", "note", text, "pip install 'vision-backbones[mm]'")]
        add("ok", ", ".join(f"{name} {versions[name]}" for name in mm))
    if "mmcv-lite" in versions:
        add("note", "mmcv-lite has no operators; torchvision's are used where available")
    return found


def examine_export(versions: Mapping[str, str]) -> list[Finding]:
    """Whether ``export`` can write and check ONNX files."""
    required = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in required if name not in versions]
    if missing:
        text = f"{', '.join(missing)} missing: ONNX files cannot be written"
        return [Finding("export", "note", text, "pip install 'vision-backbones[export]'")]
    shown = ", ".join(f"{name} {versions[name]}" for name in required)
    return [Finding("export", "ok", shown)]


def examine_caches() -> list[Finding]:
    """The cache folders, and whether they are usable."""
    folder = cpu.cache_dir()
    if (problem := kernel_cache_problem(folder)) is not None:
        instead = usable_kernel_cache()
        then = f"they are cached in {shell_word(instead)}" if instead else "slower paths are used"
        text = f"compiled kernels: {problem.reason}; {then}"
        kernels = Finding("cache", "warning", text, kernel_cache_fix())
    else:
        kernels = _examine_folder("compiled kernels", folder, "VISION_BACKBONES_CACHE_DIR")
    return [kernels, _examine_folder("downloaded weights", Path(torch.hub.get_dir()), "TORCH_HOME")]


def _examine_folder(what: str, folder: Path, variable: str) -> Finding:
    free = free_bytes(folder)
    if free is None:
        text, severity = f"{what}: {shell_word(folder)} cannot be written", "error"
    else:
        text = f"{what}: {shell_word(folder)}, {free / 1e9:.1f} GB free"
        severity = "warning" if free < _SCARCE_BYTES else "ok"
    fix = "" if severity == "ok" else f"export {variable}=/path/to/another/folder"
    return Finding("cache", severity, text, fix)


def _has_no_extension() -> bool:
    try:
        return importlib.util.find_spec("mmcv._ext") is None
    except (ImportError, ValueError):
        return True


def _report(findings: list[Finding]) -> str:
    lines = []
    width = max(len(finding.topic) for finding in findings)
    previous = ""
    for finding in findings:
        topic = finding.topic if finding.topic != previous else ""
        previous = finding.topic
        lines.append(f"{_MARKS[finding.severity]} {topic:<{width}}  {finding.text}")
        if finding.fix:
            lines.append(f"  {'':<{width}}  → {finding.fix}")
    counts = {kind: sum(f.severity == kind for f in findings) for kind in ("error", "warning")}
    summary = " and ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in counts.items() if n)
    return "\n".join([*lines, "", summary or "no problems found", ""])


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of an existing or new ``folder``; None if it cannot be written."""
    try:
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            return None
        return shutil.disk_usage(existing).free
    except OSError:
        return None


def kernel_cache_problem(folder: Path) -> Problem | None:
    """Why compiled kernels cannot be cached in ``folder``; None if they can."""
    problem = build.process.problem(folder)
    if problem is None and free_bytes(folder) is None:
        return Problem(f"{shell_word(folder)} cannot be written")
    return problem


def usable_kernel_cache() -> Path | None:
    """The first folder in which compiled kernels can be cached; None if there is none."""
    return next((p for p in folders.candidates() if kernel_cache_problem(p) is None), None)


def kernel_cache_fix() -> str:
    """The command that makes the user's kernel cache usable; "" if it is."""
    if (problem := kernel_cache_problem(cpu.cache_dir())) is None:
        return ""
    usable = usable_kernel_cache()
    folder = "/path/to/another/folder" if usable is None else shell_word(usable.parent)
    return problem.fix or f"export VISION_BACKBONES_CACHE_DIR={folder}"
