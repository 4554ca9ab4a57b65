"""A plot of figures as SVG: a panel of horizontal bars for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLUMNS = 3
WIDTH, GAP = 300, 24
LABEL, VALUE = 78, 58  # room left and right of the bars
ROW, BAR, HEAD, FOOT = 18, 12, 30, 8
HUB, OTHER, GOAL = "#0b7285", "#adb5bd", "#c92a2a"
LEGEND, NOTE = 16, "Shorter is better; dashed: the goal for the hub."
STYLE = (
    "text { font: 12px sans-serif; fill: #212529 }"
    " .title { font-weight: bold }"
    " .value { font-size: 11px; fill: #495057 }"
)


@dataclass(frozen=True)
class Panel:
    """One figure; shorter bars are better, and `goal` is marked by a line."""

    title: str
    unit: str
    digits: int
    goal: float
    values: Mapping[str, float]  # by proxy


def plot(panels: Sequence[Panel]) -> str:
    """Return an SVG document; each panel has its own scale."""
    height = HEAD + FOOT + ROW * max(len(panel.values) for panel in panels)
    rows = -(-len(panels) // COLUMNS)
    width, tall = COLUMNS * (WIDTH + GAP) + GAP, rows * (height + GAP) + GAP
    tall += LEGEND
    size = f'width="{width}" height="{tall}" viewBox="0 0 {width} {tall}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        x, y = GAP + column * (WIDTH + GAP), GAP + row * (height + GAP)
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _draw(panel)
        parts.append("</g>")
    legend = f'<text class="value" x="{GAP}" y="{tall - 10}">{NOTE}</text>'
    return "\n".join([*parts, legend, "</svg>", ""])


def _draw(panel: Panel) -> list[str]:
    title = escape(f"{panel.title} ({panel.unit})")
    parts = [f'<text class="title" y="12">{title}</text>']
    scale = (WIDTH - LABEL - VALUE) / max([*panel.values.values(), panel.goal])
    for number, (name, value) in enumerate(panel.values.items()):
        y, length = HEAD + number * ROW, value * scale
        box = f'x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}"'
        after = f'x="{LABEL + length + 5:.1f}" y="{y + 10}"'
        before = f'x="{LABEL - 6}" y="{y + 10}" text-anchor="end"'
        shown = f"{value:,.{panel.digits}f}"
        parts += [
            f"<text {before}>{escape(name)}</text>",
            f'<rect {box} fill="{HUB if name == "hub" else OTHER}"/>',
            f'<text class="value" {after}>{shown}</text>',
        ]
    x, end = LABEL + panel.goal * scale, HEAD + len(panel.values) * ROW
    parts.append(
        f'<line x1="{x:.1f}" y1="{HEAD - 5}" x2="{x:.1f}" y2="{end}" stroke="{GOAL}"'
        ' stroke-dasharray="3 2"/>'
    )
    return parts
