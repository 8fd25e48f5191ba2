"""Dispatch to the sub-commands; user errors are reported in one line."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from backbones.common.console import Parser, guard
from backbones.common.errors import CommandError
from backbones.common.messages import one_line
from backbones.core.requirements import explanation

# Name → module and one line of help. A module defines ``EXAMPLE`` (the words after the command),
# ``add_arguments`` (to an argparse parser) and ``run`` (parsed options → exit status).
COMMANDS: dict[str, tuple[str, str]] = {
    "predict": ("backbones.cli.predict", "classify images and draw class activation maps"),
    "embed": ("backbones.cli.embed", "write features of many images to Parquet; resumable"),
    "search": ("backbones.cli.search", "find the embedded images most similar to given ones"),
    "duplicates": ("backbones.cli.duplicates", "group embedded images that are nearly identical"),
    "probe": ("backbones.cli.probe", "measure how well embeddings separate classes"),
    "summary": ("backbones.cli.summary", "shape, parameters, MACs and time of every stage"),
    "export": ("backbones.cli.export", "write an ONNX or torch.export file and check it"),
    "verify": ("backbones.cli.verify", "identify a checkpoint and compare its outputs"),
    "doctor": ("backbones.cli.doctor", "find missing or conflicting software on this machine"),
    "build": ("backbones.cli.build", "compile the C++ kernels before their first use"),
    "validate": ("backbones.cli.validate", "measure the accuracy of checkpoints on a data set"),
    "upscale": ("backbones.restoration.upscale_files", "enlarge or restore images"),
    "benchmark": ("backbones.cli.benchmark", "measure time and memory, also of other libraries"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vision-backbones COMMAND …``; the exit status.

    0: success; 1: finished, but found a problem (a corrupt image, a failed check); 2: not done,
    with the reason in one line on standard error (an unknown name, a missing file); 130: Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return run_command(words[0], words[1:])
    return guard(lambda: _without_command(words))


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run one command of :data:`COMMANDS`; the exit status, as of :func:`main`."""
    path, summary = COMMANDS[name]
    program = f"vision-backbones {name}"

    def command() -> int:
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            if (reason := explanation(error)) is None:
                raise
            raise CommandError(reason) from error
        parser = Parser(
            prog=program,
            description=f"{summary[0].upper()}{summary[1:]}.",
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


def _overview() -> str:
    lines = ["usage: vision-backbones COMMAND …", ""]
    width = max(map(len, COMMANDS)) + 2
    lines += [f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [
        "",
        "Run `vision-backbones COMMAND --help` for details.",
        "",
        "example:",
        "  vision-backbones predict cat.jpg --model van_b0 --checkpoint van_b0.pth --cam cat.png",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
