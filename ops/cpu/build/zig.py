"""Compile a library with zig's clang: ``python zig.py ZIG TARGET OPTIONS -o LIBRARY``.

The options are g++'s. zig builds its own C++ library, which takes minutes, so on Linux kernels use
libstdc++ instead, which torch needs as well; elsewhere it is linked into them, always the same one,
whatever the processor's options. What zig builds is kept in ``ZIG_GLOBAL_CACHE_DIR``, by default
beside the folder of temporary files.
"""

from __future__ import annotations

import ctypes
import os
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


def main(zig: str, target: str, *options: str) -> int:
    """Compile, then link; returns the exit status."""
    os.umask(os.umask(0) | 0o022)  # nobody else may write to the cache
    library, scratch = Path(options[-1]).absolute(), Path(os.environ["TMPDIR"]).absolute()
    folder, built = library.parent, library.name  # zig reads no line breaks in names of folders
    environment = {
        "ZIG_GLOBAL_CACHE_DIR": str(scratch.parent / "zig"),
        **os.environ,
        "ZIG_LOCAL_CACHE_DIR": str(scratch / "zig"),
    }
    start = [zig, "c++", "-target", target]
    compiled = [_RENAMED.get(word, word) for word in options[:-2] if word not in ("-shared", "-s")]
    compiled += ["-fno-sanitize=undefined"]
    linked = ["-shared", "-s"]
    if "-linux-" in target:
        missing, exports = f"{built}.h", f"{built}.map"
        (folder / missing).write_text(_MISSING)
        (folder / exports).write_text(_EXPORTS)
        compiled += ["-include", missing]
        linked += ["-nostdlib++", f"-Wl,--version-script={exports}", _libstdcxx()]
    if "-windows-" in target:
        compiled.remove("-fPIC")
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
