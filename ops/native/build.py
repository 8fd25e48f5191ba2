"""Compile a C++ kernel once into a per-user cache, safely beside other processes, and load it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ops.native.recorder import recording

__all__ = [
    "Kernel",
    "cache_dir",
    "instruction_set",
    "load",
    "multiplies",
    "status",
    "unavailable_reason",
]

_log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno"]
_AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mavx2", "-mfma", "-mprfchw", "-mprefer-vector-width=512"),
]
# From the richest to the plainest; a CPU that can run one can run those after it.
_ISA_FLAGS = {
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
    "avx512": _AVX512,
    "avx2": ["-mavx2", "-mfma", "-mprfchw"],
    "portable": [],
}
# OpenMP where the compiler has it, else a library with a single thread.
_THREADING_FLAGS: list[list[str]] = [["-fopenmp"], []]
_COMPILE_TIMEOUT_S = 300


@dataclass(frozen=True)
class Kernel:
    """What became of one kernel in this process.

    Attributes:
        library: the loaded library, or ``None``.
        path: its file, or ``None``.
        instruction_set: what it was compiled for; see :func:`instruction_set`.
        reason: why there is no library, in words; ``None`` where there is one.
    """

    library: ctypes.CDLL | None
    path: Path | None
    instruction_set: str
    reason: str | None


_kernels: dict[str, Kernel] = {}
_kernels_lock = threading.Lock()
_products: dict[torch.dtype, bool] = {}  # what `multiplies` knows


def load(name: str) -> ctypes.CDLL | None:
    """The library of the kernel ``name``, compiled if need be; ``None`` if it cannot be had.

    The outcome is remembered for the life of the process. While a recorder watches, it is a library
    whose calls are recorded (:mod:`ops.native.recorder`).

    Raises:
        ValueError: if no such kernel exists.
    """
    library, recorder = status(name).library, recording()
    if library is None or recorder is None:
        return library
    return recorder.watch(library)


def unavailable_reason(name: str) -> str | None:
    """Why :func:`load` gives ``None``, in words; ``None`` where it gives a library."""
    return status(name).reason


def status(name: str) -> Kernel:
    """Build and load the kernel ``name`` on the first call; later calls repeat the outcome."""
    kernel = _kernels.get(name)
    if kernel is None:
        with _kernels_lock:
            kernel = _kernels.get(name)
            if kernel is None:
                kernel = _kernels[name] = _build_and_load(name)
    return kernel


def cache_dir() -> Path:
    """The folder of compiled kernels; it need not exist yet."""
    chosen = os.environ.get("VISION_BACKBONES_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser() / "native"
    if sys.platform == "darwin":
        base = Path("~/Library/Caches").expanduser()
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local").expanduser()
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "vision-backbones" / "native"


def instruction_set() -> str:
    """The richest instruction set that this CPU runs and that the environment allows.

    Returns:
        ``"amx"`` (with AVX-512 and its instructions for bfloat16), ``"avx512bf16"``, ``"avx512"``,
        ``"avx2"`` or ``"portable"``.

    Raises:
        ValueError: if ``VISION_BACKBONES_NATIVE_ISA`` names none of them.
    """
    known = list(_ISA_FLAGS)
    richest = _richest()
    wanted = os.environ.get("VISION_BACKBONES_NATIVE_ISA") or richest
    if wanted not in known:
        raise ValueError(f"VISION_BACKBONES_NATIVE_ISA must be one of {known}, got {wanted!r}")
    return max(richest, wanted, key=known.index)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's layers have products of ``dtype``, float32 or bfloat16, on this CPU.

    Without, oneDNN refuses bfloat16 or takes several times as long as for float32.
    """
    known = _products.get(dtype)
    if known is None:
        known = dtype != torch.bfloat16 or (
            torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and instruction_set() not in ("avx512", "avx2")
        )
        _products[dtype] = known
    return known


def _richest() -> str:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability.startswith("avx512"):
        if not torch.cpu._is_avx512_bf16_supported():
            return "avx512"
        return "amx" if torch.cpu._is_amx_tile_supported() else "avx512bf16"
    return "avx2" if capability.startswith("avx2") else "portable"


def _build_and_load(name: str) -> Kernel:
    if not (_SOURCES / f"{name}.cpp").is_file():
        known = sorted(p.stem for p in _SOURCES.glob("*.cpp"))
        raise ValueError(f"no kernel {name!r}; the kernels are {known}")
    sets = list(_ISA_FLAGS)
    # An old compiler may not know the instructions of a new CPU.
    for isa in sets[sets.index(instruction_set()) :]:
        kernel = _build_and_load_for(name, isa)
        if kernel.library is not None:
            return kernel
    _log.info("No compiled %s kernel, the pure torch path is used: %s", name, kernel.reason)
    return kernel


def _build_and_load_for(name: str, isa: str) -> Kernel:
    path = None
    try:
        if os.environ.get("VISION_BACKBONES_NATIVE", "1") == "0":
            raise _UnavailableError("switched off by VISION_BACKBONES_NATIVE=0")
        path = cache_dir() / f"{name}-{isa}-{_key(name, isa)}{_suffix()}"
        if path.is_file():
            # A damaged file, or one that another system wrote into a shared home, is replaced.
            with contextlib.suppress(OSError):
                return Kernel(ctypes.CDLL(str(path)), path, isa, None)
            path.unlink()
        _build(name, isa, path)
        return Kernel(ctypes.CDLL(str(path)), path, isa, None)
    except (_UnavailableError, OSError) as error:
        return Kernel(None, path, isa, str(error))


class _UnavailableError(Exception):
    """Why a kernel cannot be built, in words."""


def _suffix() -> str:
    return ".dll" if sys.platform == "win32" else ".so"


def _key(name: str, isa: str) -> str:
    """What the library depends on, so that no other's is ever loaded: sources, flags, platform."""
    digest = hashlib.sha256()
    for source in [_SOURCES / f"{name}.cpp", *sorted(_SOURCES.glob("*.h"))]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    platform_name = f"{sys.platform}-{platform.machine()}"
    digest.update(repr([platform_name, _COMMON_FLAGS, _ISA_FLAGS[isa], _THREADING_FLAGS]).encode())
    return digest.hexdigest()[:16]


def _compilers() -> list[list[str]]:
    """The commands to try, as argument lists."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    found: list[list[str]] = []
    for command in [chosen, ["c++"], ["g++"], ["clang++"]]:
        executable = shutil.which(command[0]) if command else None
        if executable and [executable, *command[1:]] not in found:
            found.append([executable, *command[1:]])
    return found


def _build(name: str, isa: str, path: Path) -> None:
    """Compile into a private file and move it into place, so that no one ever sees half of it."""
    compilers = _compilers()
    if not compilers:
        raise _UnavailableError("no C++ compiler found ($CXX, c++, g++ or clang++)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _locked(path.with_suffix(".lock")),
        tempfile.TemporaryDirectory(dir=path.parent) as scratch,
    ):
        if path.is_file():  # another process built it while this one waited
            return
        built = Path(scratch) / path.name
        start = time.perf_counter()
        errors = []
        for compiler in compilers:
            for threading_flags in _THREADING_FLAGS:
                flags = [*_COMMON_FLAGS, *_ISA_FLAGS[isa], *threading_flags]
                error = _compile(
                    [*compiler, *flags, str(_SOURCES / f"{name}.cpp"), "-o", str(built)]
                )
                if error is None:
                    os.replace(built, path)
                    _log.info(
                        "Compiled the %s kernel for %s in %.1f s with %s%s, kept in %s",
                        name,
                        isa,
                        time.perf_counter() - start,
                        compiler[0],
                        "" if threading_flags else " without OpenMP",
                        path,
                    )
                    return
                errors.append(error)
    raise _UnavailableError(errors[-1])


def _compile(command: list[str]) -> str | None:
    """Run the compiler; what went wrong, or ``None``."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    if done.returncode == 0:
        return None
    _log.debug("%s\n%s", shlex.join(command), done.stderr)
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    first = lines[0] if lines else done.stderr.strip()[:200]
    return f"{command[0]} failed with status {done.returncode}: {first}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process build while the others wait.

    Only saves work: where files cannot be locked, every process builds and the last one wins.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
