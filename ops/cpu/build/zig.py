"""Compile a library with zig's clang: ``python zig.py ZIG OPTIONS -o LIBRARY``, g++'s options.

zig would build its own C++ library, for each set of processor options anew, which takes a minute.
Kernels use libstdc++ instead, which torch needs as well. What zig builds for the linker, for five
seconds, is kept in ``ZIG_GLOBAL_CACHE_DIR``, by default beside the folder of temporary files.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

# Of zig's headers, but not exported by libstdc++, whose headers define them.
_MISSING = """
#include <new>
inline std::bad_alloc::bad_alloc() noexcept {}
inline std::bad_array_new_length::bad_array_new_length() noexcept {}
"""
_EXPORTS = "{ global: *; local: _Z*; };\n"
# zig has other names for ARM's extensions.
_RENAMED = {"-march=armv8.2-a+bf16": "-mcpu=generic+v8_2a+bf16"}


def main(zig: str, *options: str) -> int:
    """Compile, then link; returns the exit status."""
    os.umask(os.umask(0) | 0o022)  # nobody else may write to the cache
    library, scratch = Path(options[-1]).absolute(), Path(os.environ["TMPDIR"]).absolute()
    folder, built = library.parent, library.name  # zig reads no line breaks in names of folders
    missing, exports = f"{built}.h", f"{built}.map"
    (folder / missing).write_text(_MISSING)
    (folder / exports).write_text(_EXPORTS)
    environment = {
        "ZIG_GLOBAL_CACHE_DIR": str(scratch.parent / "zig"),
        **os.environ,
        "ZIG_LOCAL_CACHE_DIR": str(scratch / "zig"),
    }
    # By default, zig compiles for this CPU and the newest glibc that it knows; torch needs 2.28.
    start = [zig, "c++", "-target", f"{platform.machine()}-linux-gnu.2.28"]
    compiled = [_RENAMED.get(word, word) for word in options[:-2] if word not in ("-shared", "-s")]
    compiled += ["-fno-sanitize=undefined", "-include", missing]
    linked = ["-shared", "-s", "-nostdlib++", f"-Wl,--version-script={exports}", _libstdcxx()]
    for step in (
        [*start, *compiled, "-c", "-o", f"{built}.o"],
        [*start, "-O3", f"{built}.o", *linked, "-o", built],
    ):
        if status := subprocess.run(step, env=environment, cwd=folder).returncode:
            return status if status > 0 else 128 - status
    return 0


def _libstdcxx() -> str:
    """The file of the system's library."""
    ctypes.CDLL("libstdc++.so.6")
    mapped = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
    return next(line.split(maxsplit=5)[5] for line in mapped if "libstdc++.so" in line)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
