"""What a measurement belongs to: the date, the commit, and the kernels' sources."""

from __future__ import annotations

import datetime
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

from ops.cpu.build.sources import SOURCES


@functools.cache
def kernels() -> str:
    """A digest of the sources of all kernels. A row with another one is of older kernels."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*/*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def provenance() -> dict[str, str]:
    """``date`` and ``kernels``, and ``commit`` if the library lies in a checkout."""
    found = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    if commit := _commit(SOURCES.parents[1]):
        found["commit"] = commit
    return {**found, "kernels": kernels()}


def _commit(root: Path) -> str | None:
    """The commit of a checkout, marked if files were changed since; None outside of one."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    words = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    run = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=60)
    return run.stdout.strip() or None
