"""Draw block diagrams as inline SVG: boxes from top to bottom, shortcuts and parallel branches.

Diagrams are described in the pages, by :func:`parse`. Their colours come from the page's style
sheet (``docs/assets/site.css``), so that the same drawing works in light and dark mode.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

BOX_HEIGHT = 28
DETAIL_HEIGHT = 15
GAP = 16
MARGIN = 14
ARM_SPACING = 14
RADIUS = 9
LETTER = 7.0
DETAIL_LETTER = 6.1
KINDS = ("norm", "conv", "attn", "mlp", "act", "plain", "note")


@dataclass(frozen=True)
class Box:
    """One step. ``kind``, of :data:`KINDS`, selects its colour; "note" has none."""

    label: str
    kind: str = "plain"
    detail: str = ""


@dataclass(frozen=True)
class Residual:
    """Steps and the shortcut around them."""

    steps: Sequence[Step]


@dataclass(frozen=True)
class Branches:
    """Parallel sequences of steps, joined by ``+``, ``×`` or a word such as "concat"."""

    arms: Sequence[Sequence[Step]]
    join: str


Step = Box | Residual | Branches


@dataclass
class Drawing:
    """SVG elements in a coordinate system of their own, with a line from the top to the bottom.

    Attributes:
        axis: x coordinate of that line.
    """

    width: float
    height: float
    axis: float
    elements: list[str] = field(default_factory=list)

    def place(self, other: Drawing, x: float, y: float) -> None:
        """Insert ``other`` with its upper left corner at (x, y)."""
        self.elements.append(f'<g transform="translate({x:g},{y:g})">')
        self.elements += [*other.elements, "</g>"]

    def line(self, *points: tuple[float, float], arrow: bool = False) -> None:
        """Draw a line through the points."""
        path = "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.elements.append(f'<path class="wire" d="{path}"{end}/>')

    def text(self, text: str, y: float, style: str = "label") -> None:
        """Draw text centred on the axis."""
        self.elements.append(
            f'<text class="{style}" x="{self.axis:g}" y="{y:g}">{html.escape(text)}</text>'
        )

    def node(self, sign: str, y: float) -> float:
        """Draw a sign in a circle, or a word in a pill, on the axis; returns half its width."""
        half = RADIUS if len(sign) == 1 else 8 + len(sign) * DETAIL_LETTER / 2
        self.elements.append(
            f'<rect class="node" x="{self.axis - half:g}" y="{y - RADIUS:g}" '
            f'width="{2 * half:g}" height="{2 * RADIUS}" rx="{RADIUS}"/>'
        )
        self.text(sign, y + 4.5, "sign" if len(sign) == 1 else "detail")
        return half


def parse(text: str) -> list[tuple[str, list[Step]]]:
    """The titled diagrams of a description, one line a step, indented by two within another:

    - ``KIND label`` or ``KIND label | detail``: a :class:`Box`
    - ``residual`` around indented steps
    - ``branches JOIN`` with lines ``arm``, which may have indented steps

    A line that is not indented is the title of a diagram.

    Raises:
        ValueError: a line is not one of these.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    diagrams: list[tuple[str, list[Step]]] = []
    while lines:
        title = lines.pop(0)
        diagrams.append((title, _steps(lines, 1)))
    return diagrams


def _steps(lines: list[str], depth: int) -> list[Step]:
    """Take the steps of a depth from the front of ``lines``."""
    steps: list[Step] = []
    while lines and lines[0].startswith("  " * depth):
        line = lines.pop(0)[2 * depth :]
        kind, _, rest = line.partition(" ")
        if line == "residual":
            steps.append(Residual(_steps(lines, depth + 1)))
        elif kind == "branches" and rest:
            arms = []
            while lines and lines[0] == "  " * (depth + 1) + "arm":
                del lines[0]
                arms.append(_steps(lines, depth + 2))
            steps.append(Branches(arms, rest))
        elif kind in KINDS and rest:
            label, _, detail = rest.partition(" | ")
            steps.append(Box(label, kind, detail))
        else:
            raise ValueError(f"not a step of a diagram: {line!r}")
    return steps


def draw(step: Step) -> Drawing:
    """Draw one step."""
    if isinstance(step, Box):
        return _box(step)
    return _residual(step) if isinstance(step, Residual) else _branches(step)


def draw_sequence(steps: Sequence[Step]) -> Drawing:
    """Draw steps below each other, with arrows between them."""
    drawings = [draw(step) for step in steps]
    left = max((d.axis for d in drawings), default=0)
    right = max((d.width - d.axis for d in drawings), default=0)
    whole = Drawing(left + right, 0, left)
    for i, drawing in enumerate(drawings):
        if i:
            whole.line((left, whole.height), (left, whole.height + GAP), arrow=_is_boxed(steps[i]))
            whole.height += GAP
        whole.place(drawing, left - drawing.axis, whole.height)
        whole.height += drawing.height
    return whole


def _is_boxed(step: Step) -> bool:
    """Whether an arrow may end here: not at groups, which draw their own, nor at notes."""
    return isinstance(step, Box) and step.kind != "note"


def _box(box: Box) -> Drawing:
    longest = max(len(box.label) * LETTER, len(box.detail) * DETAIL_LETTER)
    width = max(longest + 22, 0 if box.kind == "note" else 92)
    height = BOX_HEIGHT + (DETAIL_HEIGHT if box.detail else 0)
    if box.kind == "note":
        height = 18
        drawing = Drawing(width, height, width / 2)
        drawing.text(box.label, 13, "detail")
        return drawing
    drawing = Drawing(width, height, width / 2)
    drawing.elements.append(
        f'<rect class="box {box.kind}" width="{width:g}" height="{height}" rx="5"/>'
    )
    drawing.text(box.label, 18.5)
    if box.detail:
        drawing.text(box.detail, 34, "detail")
    return drawing


def _residual(residual: Residual) -> Drawing:
    inner = draw_sequence(residual.steps)
    top, bottom = 10.0, 14.0
    sum_at = top + GAP + inner.height + bottom + RADIUS
    bend = inner.width + MARGIN
    drawing = Drawing(bend + 2, sum_at + RADIUS, inner.axis)
    drawing.line((inner.axis, 0), (inner.axis, top + GAP), arrow=_is_boxed(residual.steps[0]))
    drawing.place(inner, 0, top + GAP)
    drawing.line((inner.axis, top + GAP + inner.height), (inner.axis, sum_at - RADIUS), arrow=True)
    around = ((inner.axis, top), (bend, top), (bend, sum_at), (inner.axis + RADIUS, sum_at))
    drawing.line(*around, arrow=True)
    drawing.node("+", sum_at)
    return drawing


def _branches(branches: Branches) -> Drawing:
    arms = [draw_sequence(arm) if arm else Drawing(24, 0, 12) for arm in branches.arms]
    tallest = max(arm.height for arm in arms)
    starts, x = [], 0.0
    for arm in arms:
        starts.append(x)
        x += arm.width + ARM_SPACING
    axes = [start + arm.axis for start, arm in zip(starts, arms, strict=True)]
    drawing = Drawing(x - ARM_SPACING, 0, (axes[0] + axes[-1]) / 2)
    split, top = 8.0, 8.0 + GAP
    collect = top + tallest + 12
    join = collect + 12 + RADIUS
    drawing.line((drawing.axis, 0), (drawing.axis, split))
    drawing.line((axes[0], split), (axes[-1], split))
    for steps, arm, start, axis in zip(branches.arms, arms, starts, axes, strict=True):
        down = top if steps else collect
        drawing.line((axis, split), (axis, down), arrow=bool(steps) and _is_boxed(steps[0]))
        drawing.place(arm, start, top)
        if arm.height:
            drawing.line((axis, top + arm.height), (axis, collect))
    drawing.line((axes[0], collect), (axes[-1], collect))
    drawing.line((drawing.axis, collect), (drawing.axis, join - RADIUS), arrow=True)
    half = drawing.node(branches.join, join)
    drawing.height = join + RADIUS
    drawing.width = max(drawing.width, drawing.axis + half)
    return drawing


def panel(title: str, steps: Sequence[Step]) -> str:
    """One titled diagram as an ``<svg>`` on one line, so that Markdown leaves it alone."""
    inner = draw_sequence(steps)
    width = max(inner.width, len(title) * LETTER) + 2 * MARGIN
    # Centre the line in the picture, with a margin.
    left = max(MARGIN, (width - inner.width) / 2)
    top = GAP + 4
    whole = Drawing(width, inner.height + 2 * top, left + inner.axis)
    whole.line((whole.axis, 0), (whole.axis, top), arrow=_is_boxed(steps[0]))
    whole.place(inner, left, top)
    whole.line((whole.axis, top + inner.height), (whole.axis, whole.height - 2), arrow=True)
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto-start-reverse"><path class="tip" d="M0,0L8,4L0,8z"/>'
        "</marker></defs>"
    )
    label = html.escape(title, quote=True)
    return (
        f'<figure class="block"><figcaption>{label}</figcaption>'
        f'<svg role="img" aria-label="{label}" '
        f'viewBox="0 0 {width:g} {whole.height:g}" width="{width:g}" height="{whole.height:g}">'
        f"{marker}{''.join(whole.elements)}</svg></figure>"
    )


def diagram(panels: Sequence[tuple[str, Sequence[Step]]]) -> str:
    """All diagrams of a family, side by side if there is room."""
    return '<div class="blocks">' + "".join(panel(*each) for each in panels) + "</div>"
