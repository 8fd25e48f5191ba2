"""Run the kernels for another system on this one: for 64-bit ARM in qemu, for Windows in Wine.

A process of emulated_arm.cpp or emulated_windows.cpp runs in the emulator for all calls. It fetches
the pages of this process's memory that a kernel touches and sends modified ones back, so callers
can use functions like those of any other library, with any arguments.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from needed import ARM_COMPILER, EMULATOR

from ops import cpu
from ops.cpu import build, instruction_sets
from ops.cpu.build import compiler

_SYSROOT = "/usr/aarch64-linux-gnu"  # Debian's folder of the cross-compiler's libraries
# CPUs with exactly these of the instruction sets that kernels use: from 2015 and 2021.
CPUS = {"neon": "cortex-a72", "neonbf16": "neoverse-v1"}
WITH_BYTES = "neoverse-n1"  # a CPU for "neon" with int8 products, from 2019
WINDOWS = "windows"  # in place of a CPU: this one, under Wine

_FOLDER = Path(__file__).parent
_WARNINGS = ["-Wall", "-Wextra", "-Werror"]
_PAGE = 4096
# As in emulated.h.
_LOAD, _CALL, _CAPABILITIES = range(3)
_FETCH = 0
_ARGUMENTS = 6


def emulate(model: str, scratch: Path) -> Emulator:
    """Start an emulator of a CPU, or of :data:`WINDOWS`; its program goes to ``scratch``."""
    environment = dict(os.environ)
    if model == WINDOWS:
        program = scratch / "emulated_windows.exe"
        words = [*windows_compiler()[:1], "-m", "ziglang", "c++", "-target", "x86_64-windows-gnu"]
        words += ["-O3", str(_FOLDER / "emulated_windows.cpp")]
        command = ["wine", str(program)]
        environment |= {"WINEPREFIX": str(scratch / "wine"), "WINEDEBUG": "-all", "DISPLAY": ""}
    else:
        program = scratch / "emulated_arm"
        words = [ARM_COMPILER, "-O1", "-fopenmp", str(_FOLDER / "emulated_arm.cpp")]
        command = [EMULATOR, "-L", _SYSROOT, "-cpu", model, str(program)]
        environment["OMP_WAIT_POLICY"] = "passive"
    subprocess.run([*words, "-std=c++17", *_WARNINGS, "-o", str(program)], check=True)
    return Emulator(command, environment)


def windows_compiler() -> list[str]:
    """The command of ziglang's clang for Windows."""
    (words,) = compiler.zig("x86_64-windows-gnu")
    return words


class Emulator:
    """A process on an emulated CPU or system that runs functions on this process's memory."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._memory = os.open("/proc/self/mem", os.O_RDONLY)
        self._lock = threading.Lock()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        os.close(self._memory)
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def capabilities(self) -> int:
        """The value of Linux's AT_HWCAP2."""
        return self._ask(struct.pack("=Q", _CAPABILITIES))

    def load(self, path: Path) -> int:
        """Load a library; returns its number."""
        return self._ask(struct.pack("=Q", _LOAD) + _text(str(path)))

    def call(self, library: int, function: str, arguments: tuple[int, ...]) -> int:
        question = struct.pack("=2Q", _CALL, library) + _text(function)
        return self._ask(question + struct.pack(f"={_ARGUMENTS}q", *arguments))

    def _ask(self, question: bytes) -> int:
        with self._lock:
            return self._ask_alone(question)

    def _ask_alone(self, question: bytes) -> int:
        self._send(question)
        while True:
            kind, first, second = struct.unpack("=QqQ", self._receive(24))
            if kind != _FETCH:
                break
            pages = self._pages(first, second)
            self._send(struct.pack("=Q", len(pages) // _PAGE) + pages)
        changes, at = self._receive(second), 0
        while at < len(changes):
            address, count = struct.unpack_from("=2Q", changes, at)
            ctypes.memmove(address, changes[at + 16 : at + 16 + count], count)
            at += 16 + count
        return first

    def _pages(self, begin: int, count: int) -> bytes:
        """The contents of this process's mapped pages."""
        try:
            found = os.pread(self._memory, count * _PAGE, begin)
        except OSError:
            return b""
        return found[: len(found) // _PAGE * _PAGE]

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _receive(self, count: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) < count:
            raise RuntimeError(f"the emulator ended with status {self._process.wait()}")
        return data


class Emulated:
    """Stands in for a library."""


class Library(Emulated):
    """With functions like those of a ``ctypes.CDLL``."""

    def __init__(self, emulator: Emulator, path: Path) -> None:
        self._emulator, self._number = emulator, emulator.load(path)

    def __getattr__(self, name: str) -> Any:
        emulator, number = self._emulator, self._number

        def run(*arguments: int) -> int:
            return emulator.call(number, name, arguments)

        # A function called by address accepts any arguments, like one of a library, and can be
        # called by whatever has the address, such as a replay.
        called = _Callback(run)
        function = _Function(ctypes.cast(called, ctypes.c_void_p).value)
        function.called = called  # keep it alive
        setattr(self, name, function)
        return function


_Callback = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * _ARGUMENTS)


class _Function(ctypes._CFuncPtr):
    _flags_ = ctypes._FUNCFLAG_CDECL  # type: ignore[attr-defined]
    _restype_ = ctypes.c_int
    called: Any


class _Replay(Emulated):
    """Runs lists of calls natively; the functions that they call are emulated."""

    def __init__(self, native: ctypes.CDLL, emulated: Library) -> None:
        self.replay_run, self.replay_scratch_bytes = native.replay_run, native.replay_scratch_bytes
        self.replay_pointwise = emulated.replay_pointwise


def become(instructions: str, model: str, scratch: Path) -> Emulator:
    """Make this process compile kernels for such a CPU and run them in the emulator.

    Args:
        instructions: an instruction set.
        model: qemu's name of the CPU, or :data:`WINDOWS`.
        scratch: folder for the emulator's program.
    """
    libraries = build.process
    libraries.compiled_with = lambda name: [name]  # compile no other kernels along with one
    native, emulator = cpu.load("replay"), emulate(model, scratch)
    assert native is not None

    def open_library(path: Path) -> Any:
        library = Library(emulator, path)
        return _Replay(native, library) if path.name.startswith("replay-") else library

    replaced: dict[str, Callable[..., Any]] = {"_richest": lambda: instructions}
    if model == WINDOWS:
        os.environ["CXX"] = shlex.join(windows_compiler())
        replaced["system"] = lambda: "win32"
    else:
        os.environ["CXX"] = ARM_COMPILER
        replaced["machine"] = lambda: "aarch64"
    for name, function in replaced.items():
        setattr(instruction_sets, name, function)
    libraries.open = open_library
    libraries.link_gemm = lambda caller, gemm: None  # the program does
    libraries.states.clear()
    return emulator


def _text(text: str) -> bytes:
    return struct.pack("=Q", len(text.encode())) + text.encode()


# ---- kernels' tests ------------------------------------------------------------------------------
_OPS = _FOLDER / "ops"
# Kernels by the files of their tests.
KERNELS = {
    "cpu/attention/test_cascaded.py": "cascaded_attention",
    "cpu/attention/test_gated.py": "attention",
    "cpu/attention/test_grouped.py": "attention",
    "cpu/deformable/test_deformable_conv.py": "deformable",
    "cpu/depthwise/test_conv.py": "depthwise",
    "cpu/feed_forward/test_depthwise_mlp.py": "depthwise_mlp",
    "cpu/feed_forward/test_kan.py": "kan",
    "cpu/feed_forward/test_response_mlp.py": "response_mlp",
    "cpu/gemm/test_linear.py": "gemm",
    "cpu/layout/test_maps.py": "nchw",
    "cpu/norm/test_norms.py": "norm",
    "cpu/resize/test_resize.py": "resize",
    "cpu/scan/test_scans.py": "gated_scan",
    "cpu/stem/test_packed_stem.py": "stem",
    "neighborhood/test_cpu.py": "neighborhood",
    "neighborhood/test_exact.py": "neighborhood",
    "neighborhood/test_split.py": "neighborhood",
    "test_orders.py": "selective_scan",
    **{
        f"cpu/test_convolutions.py::{test}[{kernel}]": kernel
        for kernel in ("direct", "gemm", "winograd")
        for test in ("test_is_the_convolution", "test_pieces_of_large_maps_and_threads")
    },
    "cpu/test_convolutions.py::test_in_int8_windows_are_rows": "gemm",
    "replay/test_replay.py::test_pointwise_calls_equal_torchs_bitwise": "replay",
}
# What compiles for other CPUs, or takes minutes in an emulator.
_LEFT_OUT = ["instruction_sets", "larger_than_the_caches", "units_of_work", "memory_does_not_grow"]
_RUN = """
import sys, pytest, emulators
from pathlib import Path
from ops import cpu
instructions, model, scratch, kernel, *arguments = sys.argv[1:]
emulator = emulators.become(instructions, model, Path(scratch))
assert isinstance(cpu.load(kernel), emulators.Emulated), cpu.unavailable_reason(kernel)
failed = pytest.main(arguments)
emulator.close()
sys.exit(failed)
"""


def run_tests(tests: str, instructions: str, model: str, scratch: Path) -> str:
    """Run a file of :data:`KERNELS` with its kernel in an emulator; returns what pytest says.

    Raises:
        AssertionError: a test failed; the message ends with pytest's.
    """
    chosen = " and ".join(f"not {name}" for name in _LEFT_OUT)
    options = ["-q", "-p", "no:cacheprovider", "-o", "timeout=800", "-k", chosen, str(_OPS / tests)]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, instructions, model, str(scratch), KERNELS[tests], *options],
        cwd=_FOLDER.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [_FOLDER.parent, _FOLDER]))},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout
