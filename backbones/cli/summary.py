"""``vision-backbones summary``: shape and cost of every stage of a model, or every kernel call."""

from __future__ import annotations

import math
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

import backbones
from backbones.cli.common import add_size_argument, two_sides
from backbones.cli.measure import measure, part_of
from backbones.common.arguments import nonempty_path, whole
from backbones.common.dtypes import COMPUTED, check_dtype
from backbones.common.errors import CommandError, required
from backbones.common.figures import INK, drawable, new_figure, save_figure, style_axis
from backbones.common.outputs import FIGURE, add_overwrite, json_text, require_writable
from backbones.common.tables import count_text, table
from backbones.core.base import StagedBackbone
from backbones.core.loaded import create, fuse
from backbones.fusing.explain import BufferUse, MemoryUse

EXAMPLE = "van_b0 --size 224\n  vision-backbones summary van_b0 --kernels --plot memory.png"

_DTYPES = ("float32", "bfloat16", "int8", "auto")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="name of the architecture")
    add_size_argument(parser, "image size: one side, or height and width (default: the model's)")
    add("--fused", action="store_true", help="apply fuse() first")
    add("--runs", type=whole(0, 10**6), help="timed runs (5; with --kernels 10); 0: no times")
    kernels = parser.add_argument_group("kernels of the model after fuse()")
    add = kernels.add_argument
    text = "list every kernel call, why it was chosen, and its time"
    add("--kernels", action="store_true", help=text)
    add("--plain", action="store_true", help="show the model before fuse()")
    add("--batch", type=whole(1), metavar="N", help="batch size (1)")
    add("--dtype", choices=_DTYPES, help="dtype of weights and images (float32)")
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=nonempty_path, metavar="PNG", help="draw the memory plan")
    add_overwrite(parser)


def run(options: Namespace) -> int:
    if options.kernels:
        return _run_kernels(options)
    for name in ("plain", "batch", "dtype", "json", "plot"):
        if getattr(options, name):
            raise CommandError(f"--{name} requires --kernels")
    runs = 5 if options.runs is None else options.runs
    model = create(options.model)
    height, width = two_sides(options.size, model)
    if options.fused:
        fuse(model)
    sys.stdout.write(describe(options.model, model, height, width, runs))
    return 0


def _run_kernels(options: Namespace) -> int:
    runs = 10 if options.runs is None else options.runs
    if not runs:
        raise CommandError("--kernels needs times: --runs must be at least 1")
    if options.plain and (options.fused or options.plot is not None):
        other = "--fused" if options.fused else "--plot"
        raise CommandError(
            f"--plain and {other} are mutually exclusive: only fused models have a memory plan"
        )
    if options.plot is not None:
        required("matplotlib", "--plot")
    require_writable({"--plot": (options.plot, FIGURE)}, overwrite=options.overwrite)
    model = create(options.model)
    batch = options.batch or 1
    size = two_sides(options.size, model)
    name = options.dtype or "float32"
    if options.plain and name == "int8":
        raise CommandError("--dtype int8 is for fused models: leave out --plain")
    if name in ("int8", "auto"):
        name = check_dtype(name, torch.device("cpu"))
    dtype = COMPUTED[name]
    if options.plain:
        model.to(dtype)
    else:
        fuse(model, dtype=dtype)
    try:
        explained = backbones.explain(model, size, batch_size=batch, repeats=runs)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if options.plot is not None:
        if explained.memory is None:
            raise CommandError(
                f"--plot {options.plot}: no memory plan, because {options.model} is not replayed: "
                f"{explained.not_replayed}"
            )
        _draw_memory(options.plot, explained, explained.memory)
    text = json_text(explained.to_dict()) if options.json else str(explained)
    sys.stdout.write(text)
    return 0


_FIELD = (
    "field: side of the receptive field in pixels, from kernels and windows (global: the whole "
    "image, through attention); gates computed from a mean over the map are not counted."
)
_NO_FIELD = "The receptive field is known only for models of this library."


def describe(name: str, model: Any, height: int, width: int, runs: int = 5) -> str:
    """The table as text, with a note that explains the columns."""
    parts = measure(model, height, width, runs)
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
    text = table(("part", "output", "params", "MACs", "time", "field"), rows, left=2)
    note = (
        f"{name}, one image of {height}×{width}. MACs: multiply-accumulates of convolutions and "
        f"matrix products. {_FIELD if isinstance(model, StagedBackbone) else _NO_FIELD}"
    )
    return f"{text}\n{textwrap.fill(note, 96)}\n"


def _field(side: float | None) -> str:
    if side is None:
        return ""
    return "global" if math.isinf(side) else f"{side:.0f}"


_PEAK = "#c62828"
# Of successive parts of the network.
_COLORS = (
    *("#3f78c4", "#7fa9dd", "#2f8f83", "#86c5ba", "#8a6bb8", "#bda6da", "#d08a3c", "#e6bd8b"),
    *("#5f6b7a", "#aab3bf"),
)


def _draw_memory(path: Path, explained: backbones.Explanation, memory: MemoryUse) -> None:
    """Draw each buffer of the workspace at its offset, over its lifetime."""
    from matplotlib.patches import Patch, Rectangle

    unit, scale = ("KiB", 2**10) if memory.nbytes < 2**20 else ("MiB", 2**20)
    parts = [part_of(call.layer) for call in explained.calls]
    ordered = sorted(memory.planned, key=lambda buffer: buffer.first)
    drawn = dict.fromkeys(parts[buffer.first] for buffer in ordered)
    colors = {part: _COLORS[i % len(_COLORS)] for i, part in enumerate(drawn)}
    figure = new_figure(11, 5.2)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.19, top=0.86)
    axis = figure.subplots()
    for buffer in memory.planned:
        corner = (buffer.first, (buffer.offset or 0) / scale)
        length, height = buffer.last + 1 - buffer.first, buffer.nbytes / scale
        color = colors[parts[buffer.first]]
        paint: dict[str, Any] = {"facecolor": color, "edgecolor": "white", "linewidth": 0.7}
        axis.add_patch(Rectangle(corner, length, height, **paint))
    top = memory.nbytes / scale
    axis.axhline(top, color=_PEAK, linewidth=1.4)
    place: dict[str, Any] = {"ha": "right", "va": "bottom"}
    label = f"workspace {top:.2f} {unit}"
    axis.text(len(parts), 1.012 * top, label, color=_PEAK, fontsize=10, **place)
    _label_largest(axis, memory.planned, scale, top, len(parts))
    axis.set_xlim(0, len(parts))
    axis.set_ylim(0, 1.08 * top)
    style_axis(axis, f"offset in the workspace, {unit}", "call")
    handles = [Patch(color=color, label=drawable(part)) for part, color in colors.items()]
    style: dict[str, Any] = {"frameon": False, "fontsize": 9.5, "labelcolor": INK}
    style |= {"ncols": min(9, len(colors)), "handlelength": 1.1, "columnspacing": 1.4}
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.065, 0.01), **style)
    size = "×".join(map(str, explained.input_shape))
    title = drawable(f"{explained.model}, {size} {explained.dtype}: reuse {memory.reuse:.1f}×")
    figure.suptitle(title, x=0.012, y=0.975, ha="left", fontsize=13, color=INK, fontweight="bold")
    total = sum(buffer.nbytes for buffer in memory.planned) / scale
    text = (
        f"{len(memory.planned)} buffers, {total:.2f} {unit} in total, at most "
        f"{memory.peak / scale:.2f} {unit} live at a time; a rectangle spans its buffer's lifetime"
    )
    figure.text(0.012, 0.905, text, ha="left", va="center", fontsize=10, color="#56606e")
    save_figure(figure, path)


def _label_largest(
    axis: Any, planned: list[BufferUse], scale: float, top: float, calls: int
) -> None:
    """Label the rectangles that are large enough with their buffers' shapes."""
    for buffer in planned:
        text = "×".join(map(str, buffer.shape))
        length, height = buffer.last + 1 - buffer.first, buffer.nbytes / scale
        if height > 0.045 * top and length > 0.0088 * calls * len(text):
            x, y = buffer.first + length / 2, (buffer.offset or 0) / scale + height / 2
            axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white")
