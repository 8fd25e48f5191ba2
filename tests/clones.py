"""A fresh clone of the repository, and Python programs that run in it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from commands import SHOWN

ROOT = Path(__file__).resolve().parents[1]


def fresh_clone(folder: Path) -> Path:
    """Make ``folder`` like a fresh ``git clone``, plus changes that are not committed yet."""
    for name in _tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return folder


@functools.cache
def _tracked() -> list[str]:
    """Existing files under version control or, without Git, all files that are not ignored."""
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [name for name in listed.split("\0")[:-1] if (ROOT / name).is_file()]
    lines = (ROOT / ".gitignore").read_text().split()
    ignored = [line.strip("/") for line in lines if not line.startswith("/")]
    at_the_top = [line.strip("/") for line in lines if line.startswith("/")]
    found: list[str] = []
    for place, folders, files in os.walk(ROOT):
        here = at_the_top if Path(place) == ROOT else ()
        skip = shutil.ignore_patterns(".git", *ignored, *here)(place, [*folders, *files])
        folders[:] = [name for name in folders if name not in skip]
        relative = Path(place).relative_to(ROOT)
        found += [str(relative / name) for name in files if name not in skip]
    return found


class Workshop:
    """Runs Python programs against a clone's library, which is imported once for all of them.

    Args:
        clone: from :func:`fresh_clone`; programs import from there.
        modules: modules to import beforehand.
        log: the file for what is printed meanwhile; default: next to the clone.
        environment: environment variables; default: those of this process.
    """

    def __init__(
        self,
        clone: Path,
        modules: Sequence[str],
        log: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        server = [sys.executable, str(Path(__file__).with_name("fork_server.py")), *modules]
        env = {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.log = log or clone.with_name(f"{clone.name}.log")
        with self.log.open("w") as errors:
            self._server = subprocess.Popen(
                server,
                cwd=clone,
                env={**environment, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        try:
            self._answer()
        except AssertionError:
            self.close()
            raise

    def run(
        self, words: Sequence[str], cwd: Path, seconds: float, env: Mapping[str, str] | None = None
    ) -> str:
        """Run a program and return its output on both streams.

        Args:
            words: the command line after ``python``.
            seconds: time limit.
            env: further environment variables.

        Raises:
            AssertionError: it failed or exceeded the limit; the message has the output.
        """
        output = cwd.with_name(f"{cwd.name}.output")
        job = {"words": list(words), "cwd": str(cwd), "seconds": seconds, "env": dict(env or {})}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({**job, "output": str(output)}) + "\n")
        self._server.stdin.flush()
        status = self._answer()
        said = output.read_text(errors="replace")
        assert status == "0", f"{' '.join(words)} ended with {status}\n{said[-SHOWN:]}"
        return said

    def close(self) -> None:
        """Stop the server and any processes that it left."""
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        answer = self._server.stdout.readline().strip()
        assert answer, f"the server of the programs has ended:\n{self.log.read_text()[-SHOWN:]}"
        return answer
