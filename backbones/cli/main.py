"""Find the sub-command, run it, and turn what a user can mend into one line."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from backbones import CheckpointError
from backbones._requirements import explanation

try:
    from backbones.cli.common import CommandError
    from backbones.training.errors import TrainingError
except ImportError as error:
    if (reason := explanation(error)) is None:
        raise
    raise ImportError(reason) from error

__all__ = ["COMMANDS", "main", "run_command"]

# Name → module and one line of help. A module offers ``EXAMPLE`` (the words after the command),
# ``add_arguments`` (of an argparse parser) and ``run`` (parsed options → exit status). A file
# instead is a script of tools/, whose ``main`` (words → exit status) is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "predict": ("backbones.cli.predict", "classify images, and show where the model looks"),
    "summary": ("backbones.cli.summary", "shape, parameters, MACs and time of every stage"),
    "export": ("backbones.cli.export", "write an ONNX or a torch.export file, and check it"),
    "verify": ("backbones.cli.verify", "say what a checkpoint is, and compare its outputs"),
    "doctor": ("backbones.cli.doctor", "look for what is missing or clashes on this machine"),
    "validate": ("validate.py", "accuracy of checkpoints on a data set"),
    "upscale": ("upscale.py", "enlarge images and restore them"),
    "benchmark": ("benchmark.py", "time and memory, beside other libraries"),
}
_EXAMPLES = {
    "validate": "--data /path/to/images --model van_b0 --checkpoint van_b0.pth",
    "upscale": "photos/ --model hat_x4 --checkpoint HAT_SRx4.pth --out enlarged",
    "benchmark": "--models unireplknet_a van_b0 --modes eager fused --threads 1 2",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vision-backbones COMMAND …``; the exit status.

    0: done; 1: done, and something was found wrong (a corrupt image, a failed check); 2: not done,
    for a reason that one line on standard error says (Ctrl-C, a name or file that is not there).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"vision-backbones {importlib.metadata.version('vision-backbones')}\n")
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1) or list(COMMANDS)
        sys.stderr.write(f"error: no command {words[0]!r}; did you mean {' or '.join(near)}?\n")
        return 2
    return run_command(words[0], words[1:])


def run_command(name: str, argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run one command of :data:`COMMANDS`; the exit status, as of :func:`main`.

    Args:
        argv: the words after the command; None for those of the process.
        program: what ``--help`` calls it; default ``vision-backbones NAME``.
    """
    path, summary = COMMANDS[name]
    program = program or f"vision-backbones {name}"
    try:
        if path.endswith(".py"):
            return _run_script(name, program, sys.argv[1:] if argv is None else argv)
        command = importlib.import_module(path)
        parser = argparse.ArgumentParser(
            prog=program,
            description=_sentence(summary),
            epilog=f"example:\n  {program} {command.EXAMPLE}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(parser)
        return int(command.run(parser.parse_args(argv)))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 2
    except BrokenPipeError:
        # Whoever read our output has gone (`… | head`); nobody is left to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as leaving:  # argparse: 0 after --help, 2 after words that it cannot take
        return int(leaving.code or 0)
    except (CommandError, CheckpointError, TrainingError, OSError) as error:
        # Written for the user; other errors are bugs and keep their trace.
        sys.stderr.write(f"error: {error}\n")
        return 2


def _run_script(name: str, program: str, argv: Sequence[str]) -> int:
    """Run a script of tools/ in this process: as a file of the package, or of the checkout.

    As a command it has a shorter help than as a script, which begins with its docstring.
    """
    file, summary = COMMANDS[name]
    here = Path(__file__).parent
    path = next(
        p for p in (here / "scripts" / file, here.parents[1] / "tools" / file) if p.is_file()
    )
    before = sys.argv, list(sys.path)
    sys.path.insert(0, str(path.parent))
    try:
        script = runpy.run_path(str(path))
        script["main"].__globals__["__doc__"] = _sentence(summary)
        sys.argv = [program, *argv]  # where argparse finds the program's name
        return int(script["main"](list(argv)) or 0)
    except SystemExit as leaving:
        if not leaving.code:  # after --help
            sys.stdout.write(f"\nexample:\n  {program} {_EXAMPLES[name]}\n")
        raise
    finally:
        sys.argv, sys.path[:] = before


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _overview() -> str:
    lines = ["usage: vision-backbones COMMAND …", ""]
    width = max(map(len, COMMANDS)) + 2
    lines += [f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [
        "",
        "`vision-backbones COMMAND --help` says more.",
        "",
        "example:",
        "  vision-backbones predict cat.jpg --model van_b0 --checkpoint van_b0.pth --cam cat.png",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
