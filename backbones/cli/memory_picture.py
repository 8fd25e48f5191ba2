"""The picture of ``summary --kernels``: the memory plan of a replayed model, call by call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backbones.common.figures import INK, drawable, new_figure, save_figure, style_axis
from backbones.fusing.explain import BufferUse, Explanation

_PEAK = "#c62828"
# Of successive parts of the network.
_COLORS = (
    *("#3f78c4", "#7fa9dd", "#2f8f83", "#86c5ba", "#8a6bb8", "#bda6da", "#d08a3c", "#e6bd8b"),
    *("#5f6b7a", "#aab3bf"),
)


def draw_memory(path: Path, explained: Explanation) -> None:
    """Draw each buffer of the workspace at its offset, over its lifetime.

    Args:
        path: the PNG.
        explained: with ``memory``.
    """
    from matplotlib.patches import Patch, Rectangle

    memory = explained.memory
    assert memory is not None
    unit, scale = ("KiB", 2**10) if memory.nbytes < 2**20 else ("MiB", 2**20)
    parts = _parts(explained)
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
    figure.legend(
        handles=[Patch(color=color, label=drawable(part)) for part, color in colors.items()],
        loc="lower left",
        bbox_to_anchor=(0.065, 0.01),
        ncols=min(9, len(colors)),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=1.1,
        columnspacing=1.4,
    )
    size = "×".join(map(str, explained.input_shape))
    figure.suptitle(
        drawable(f"{explained.model}, {size} {explained.dtype}: reuse {memory.reuse:.1f}×"),
        x=0.012,
        y=0.975,
        ha="left",
        fontsize=13,
        color=INK,
        fontweight="bold",
    )
    total = sum(buffer.nbytes for buffer in memory.planned) / scale
    figure.text(
        0.012,
        0.905,
        f"{len(memory.planned)} buffers, {total:.2f} {unit} in total, at most "
        f"{memory.peak / scale:.2f} {unit} live at a time; a rectangle spans its buffer's lifetime",
        ha="left",
        va="center",
        fontsize=10,
        color="#56606e",
    )
    save_figure(figure, path)


def _parts(explained: Explanation) -> list[str]:
    """The part of the network each call belongs to: the stem, a stage, or another module."""
    found = []
    for call in explained.calls:
        names = call.layer.split(".")
        staged = names[0] == "stages" and len(names) > 1
        found.append(f"stage {int(names[1]) + 1}" if staged else names[0] or "model")
    return found


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
