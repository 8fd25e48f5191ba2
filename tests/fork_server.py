"""Run Python programs one after another, each in a fork that has already imported the library.

A script of :class:`clones.Workshop`. Its arguments are modules to import. Each line of its input is
a job in JSON: ``words``, the command line after ``python``; ``cwd``; ``env``, further environment
variables; ``output``, the file for both streams; ``seconds``, the time limit, after which the
program prints its stacks and exits. The answer is a line with the exit status.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Import the modules, report that, and run jobs until the input ends."""
    sys.path.pop(0)  # hide the folder of this file from programs
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _run(job: dict[str, Any]) -> None:
    """Run the program in this process; does not return."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
    os.dup2(1, 2)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    faulthandler.dump_traceback_later(job["seconds"], exit=True)
    status = 1
    try:
        _interpret(job["words"])
        status = 0
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            sys.stderr.write(f"{leaving.code}\n")
        else:
            status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _interpret(words: list[str]) -> None:
    """Interpret a command line like Python itself: ``-m MODULE …`` or ``FILE …``."""
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
