"""Find the sub-command, run it, and turn what a user can mend into one line."""

from __future__ import annotations

import difflib
import importlib.metadata
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from backbones.core.console import CommandError, Parser, guard
from backbones.core.messages import one_line
from backbones.core.requirements import explanation

__all__ = ["COMMANDS", "main", "run_command"]

# Name → module and one line of help. A module offers ``EXAMPLE`` (the words after the command),
# ``add_arguments`` (of an argparse parser) and ``run`` (parsed options → exit status). A file
# instead is a script of tools/, whose ``main`` (words → exit status) is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "predict": ("backbones.cli.predict", "classify images, and show where the model looks"),
    "embed": ("backbones.cli.embed", "features of many images, in Parquet; goes on after any end"),
    "search": ("backbones.cli.search", "the embedded images that are most like others"),
    "duplicates": ("backbones.cli.duplicates", "groups of embedded images that hardly differ"),
    "probe": ("backbones.cli.probe", "how well embeddings tell classes apart"),
    "summary": ("backbones.cli.summary", "shape, parameters, MACs and time of every stage"),
    "export": ("backbones.cli.export", "write an ONNX or a torch.export file, and check it"),
    "verify": ("backbones.cli.verify", "say what a checkpoint is, and compare its outputs"),
    "doctor": ("backbones.cli.doctor", "look for what is missing or clashes on this machine"),
    "build": ("backbones.cli.build", "compile the C++ kernels ahead of their first use"),
    "validate": ("validate.py", "accuracy of checkpoints on a data set"),
    "upscale": ("backbones.restoration.upscale_files", "enlarge images and restore them"),
    "benchmark": ("benchmark.py", "time and memory, beside other libraries"),
}
_EXAMPLES = {
    "validate": "--data /path/to/images --model van_b0 --checkpoint van_b0.pth",
    "benchmark": "--models unireplknet_a van_b0 --modes eager fused --threads 1 2",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vision-backbones COMMAND …``; the exit status.

    0: done; 1: done, and something was found wrong (a corrupt image, a failed check); 2: not done,
    for a reason that one line on standard error says (a name or file that is not there); 130 after
    Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return run_command(words[0], words[1:])
    return guard(lambda: _without_command(words))


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run one command of :data:`COMMANDS`; the exit status, as of :func:`main`.

    Args:
        argv: the words after the command.
    """
    path, summary = COMMANDS[name]
    program = f"vision-backbones {name}"

    def command() -> int:
        try:
            if path.endswith(".py"):
                return _run_script(name, program, argv)
            module = importlib.import_module(path)
        except ImportError as error:
            if (reason := explanation(error)) is None:
                raise
            raise CommandError(reason) from error
        parser = Parser(
            prog=program,
            description=_sentence(summary),
            epilog=f"example:\n  {program} {module.EXAMPLE}".rstrip(),
        )
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(argv)))

    return guard(command)


def _without_command(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"vision-backbones {importlib.metadata.version('vision-backbones')}\n")
        return 0
    near = difflib.get_close_matches(words[0], COMMANDS, n=1) or list(COMMANDS)
    name = one_line(repr(words[0]))
    sys.stderr.write(f"error: no command {name}; did you mean {' or '.join(near)}?\n")
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
        status = guard(lambda: script["main"](list(argv)))
        if not status and {"-h", "--help"} & set(argv):
            sys.stdout.write(f"\nexample:\n  {program} {_EXAMPLES[name]}\n")
        return status
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
