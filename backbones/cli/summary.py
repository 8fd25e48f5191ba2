"""``vision-backbones summary``: what every stage of a model is and costs."""

from __future__ import annotations

import math
import sys
import textwrap
from argparse import ArgumentParser, Namespace

from backbones.cli.common import add_size_argument, count_text, create, table, two_sides
from backbones.cli.measure import measure
from backbones.core.arguments import whole

__all__ = ["EXAMPLE", "add_arguments", "describe", "run"]

EXAMPLE = "van_b0 --size 224"


def add_arguments(parser: ArgumentParser) -> None:
    """The command line of ``summary``."""
    parser.add_argument("model", help="name of the architecture")
    add_size_argument(parser, "of the image: a side, or height and width (default: the model's)")
    parser.add_argument("--fused", action="store_true", help="of the model after fuse()")
    parser.add_argument("--runs", type=whole(0), default=5, help="for the time; 0 leaves it out")


def run(options: Namespace) -> int:
    """Run ``summary``; 0."""
    model = create(options.model)
    height, width = two_sides(options.size, model, runs=options.runs > 0)
    if options.fused:
        model.fuse()
    sys.stdout.write(describe(options.model, model, height, width, options.runs))
    return 0


def describe(name: str, model: object, height: int, width: int, runs: int = 5) -> str:
    """The table as text, with a line that says what its columns are."""
    parts = measure(model, height, width, runs)  # type: ignore[arg-type]
    params, macs = sum(p.params for p in parts), sum(p.macs for p in parts)
    rows = [
        [
            part.name,
            "×".join(map(str, part.shape)),
            count_text(part.params),
            count_text(part.macs),
            "" if part.share is None else f"{100 * part.share:.1f} %",
            _field(part.receptive_field),
        ]
        for part in parts
    ]
    rows.append(["total", "", count_text(params), count_text(macs), "", ""])
    text = table(("part", "output", "params", "MACs", "time", "sees"), rows, left=2)
    note = (
        f"{name}, one image of {height}×{width}. MACs: of convolutions and matrix products. Sees: "
        "the side of the square of pixels from which kernels and windows lead to one position of "
        "the map; global: all of them, by attention. Gates by a mean over the map do not count."
    )
    return f"{text}\n{textwrap.fill(note, 96)}\n"


def _field(side: float | None) -> str:
    if side is None:
        return ""
    return "global" if math.isinf(side) else f"{side:.0f}"
