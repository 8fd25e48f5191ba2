"""``vision-backbones build``: compile the C++ kernels before their first use."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace

from backbones.common.errors import CommandError
from ops import cpu
from ops.cpu.build.folders import shell_word

EXAMPLE = "--isa avx2 avx512bf16"


def add_arguments(parser: ArgumentParser) -> None:
    sets = [*cpu.levels(), "all"]
    text = f"instruction sets: {', '.join(cpu.levels())}, or all (default: this CPU's)"
    parser.add_argument("--isa", nargs="+", choices=sets, metavar="SET", help=text)


def run(options: Namespace) -> int:
    sets = options.isa or [cpu.instruction_set()]
    for isa in cpu.levels() if "all" in sets else dict.fromkeys(sets):
        start = time.monotonic()
        try:
            folder = cpu.prepare(isa)
        except RuntimeError as error:
            raise CommandError(f"no kernels for {isa}: {error}") from error
        if folder is None:
            text = "shipped with the package"
        else:
            text = f"in {shell_word(folder)}, after {time.monotonic() - start:.0f} s"
        sys.stdout.write(f"kernels for {isa}: {text}\n")
    return 0
