"""Hatchling build hook: adds the C++ kernels to wheels, compiled for every instruction set.

Wheels built from a checkout (``pip wheel .``, ``make wheel``) include them. Editable installs and
wheels built from a source distribution don't: there, kernels are compiled on first use for the
CPU. The same applies with ``VISION_BACKBONES_NATIVE=0``. Without a compiler, the build requires the
package ``ziglang``, which has one.

``VISION_BACKBONES_WHEEL_MACHINE=aarch64`` builds the wheel for that architecture, with the
cross-compiler ``CXX``, by default ``aarch64-linux-gnu-g++``; ``win_amd64`` and ``macosx_arm64``
build those for Windows and macOS, with ``ziglang``.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PLACE = "ops/cpu/compiled"


class _Target(NamedTuple):
    """What a wheel is for: ``sys.platform``, architecture, tag, and zig's name for it, if any."""

    system: str
    machine: str
    tag: str
    zig: str = ""


_TARGETS = {
    "x86_64": _Target("linux", "x86_64", "linux_x86_64"),
    "aarch64": _Target("linux", "aarch64", "linux_aarch64"),
    "win_amd64": _Target("win32", "x86_64", "win_amd64", "x86_64-windows-gnu"),
    "macosx_arm64": _Target("darwin", "aarch64", "macosx_11_0_arm64", "aarch64-macos.11.0"),
}
_CHOSEN = "VISION_BACKBONES_WHEEL_MACHINE"
# Strip symbols, which only debuggers need.
_OPTIONS = ["-s"]


class CompiledKernels(BuildHookInterface):
    """See the top of this file."""

    _scratch: tempfile.TemporaryDirectory[str] | None = None

    def dependencies(self) -> list[str]:
        """``ziglang`` if there is no compiler; for editable installs as well, which look alike."""
        with _engine(Path(self.root)) as engine:
            target = self._target(engine)
            if target is None or not engine.instruction_sets.is_switched_on():
                return []
            try:
                _find_compilers(engine, target)
            except engine.compiler.NoCompilerError:
                return ["ziglang>=0.17"]
            except FileNotFoundError:
                pass  # initialize tells
        return []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as platform-specific."""
        if version == "editable":
            return
        with _engine(Path(self.root)) as engine:
            target = self._target(engine)
            made = [] if target is None else self._compile(engine, target)
        if target is not None and made:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{target.tag}"
            build_data["force_include"] |= {str(p): f"{_PLACE}/{p.name}" for p in made}

    def _target(self, engine: types.SimpleNamespace) -> _Target | None:
        """What to compile for; None if nothing is compiled."""
        if Path(self.root, "PKG-INFO").exists() or sys.platform != "linux":
            return None
        chosen: str = os.environ.get(_CHOSEN) or engine.instruction_sets.machine()
        if _CHOSEN in os.environ and chosen not in _TARGETS:
            raise ValueError(f"{_CHOSEN} must be one of {tuple(_TARGETS)}, got {chosen!r}")
        return _TARGETS.get(chosen)

    def _compile(self, engine: types.SimpleNamespace, target: _Target) -> list[Path]:
        """Compile the libraries, or reuse those cached in ``build`` for the same sources."""
        if not engine.instruction_sets.is_switched_on():
            return []
        try:
            compilers = _find_compilers(engine, target)
        except engine.compiler.NoCompilerError as error:
            self.app.display_warning(f"A wheel without compiled kernels: {error}")
            return []
        folder, sources = self._folder(), engine.sources.Sources()

        def library(isa: str, name: str) -> Path | str:
            stem = sources.stem(name, isa, target.machine, target.system)
            path = folder / f"{stem}{engine.sources.suffix(target.system)}"
            if path.exists():
                return path
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch, name)
                try:
                    sources.compile(built, name, isa, compilers, _OPTIONS)
                except engine.compiler.RefusedError as error:
                    return f"No {name} kernel for {isa}: {error}"
                os.replace(built, path)
            return path

        sets = engine.instruction_sets.levels(target.machine)
        pairs = [(isa, name) for isa in sets for name in sources.all()]
        self.app.display_info(f"Compiling C++ kernels for {', '.join(sets)}: some minutes")
        start = time.monotonic()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            outcomes = list(pool.map(lambda pair: library(*pair), pairs))
        for text in outcomes:
            if isinstance(text, str):
                self.app.display_warning(text)
        made = [path for path in outcomes if isinstance(path, Path)]
        took = time.monotonic() - start
        self.app.display_info(f"{len(made)} libraries in {took:.0f} s, kept in {str(folder)!r}")
        return made

    def _folder(self) -> Path:
        """Where libraries are kept; one that this build removes if the checkout is read-only."""
        folder = Path(self.root, "build", "kernels")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            self._scratch = tempfile.TemporaryDirectory()
            self.app.display_warning(f"The kernels are not kept for the next build: {error}")
            return Path(self._scratch.name)
        return folder

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the folder of a read-only checkout."""
        if self._scratch is not None:
            self._scratch.cleanup()


def _find_compilers(engine: types.SimpleNamespace, target: _Target) -> list[list[str]]:
    """Compiler commands to try; for another architecture, only the cross-compiler.

    Raises:
        NoCompilerError: there is none for this machine.
        FileNotFoundError: there is no cross-compiler.
    """
    machine = target.machine
    if target.zig:
        if found := engine.compiler.zig(target.zig):
            return list(found)
        raise engine.compiler.NoCompilerError(f"a wheel for {target.tag} needs ziglang")
    chosen = engine.compiler.command()
    if machine == engine.instruction_sets.machine():
        return engine.compiler.find_compilers(chosen)
    words = chosen or [f"{machine}-linux-gnu-g++"]
    if shutil.which(words[0]) is None:
        raise FileNotFoundError(
            f"a wheel for {machine} needs a cross-compiler, and there is no {words[0]!r}: set CXX, "
            f"or install one such as Debian's g++-{machine.replace('_', '-')}-linux-gnu"
        )
    return [words]


@contextmanager
def _engine(root: Path) -> Iterator[types.SimpleNamespace]:
    """Modules of ``ops.cpu``, without importing the packages, since torch is not available."""
    names = ("build.compiler", "build.sources", "instruction_sets")
    before = {k: v for k, v in sys.modules.items() if k.partition(".")[0] == "ops"}
    for name in before:
        del sys.modules[name]
    try:
        for package in ("ops", "ops.cpu", "ops.cpu.build"):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(root.joinpath(*package.split(".")))]
        modules = {
            name.rpartition(".")[2]: importlib.import_module(f"ops.cpu.{name}") for name in names
        }
        yield types.SimpleNamespace(**modules)
    finally:
        for name in [k for k in sys.modules if k.partition(".")[0] == "ops"]:
            del sys.modules[name]
        sys.modules.update(before)
