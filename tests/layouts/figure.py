"""Two pictures side by side, as SVG: one job gone on with in many layouts, and many gone on with in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, GAP = 440, 250, 52, 44, 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


class Curve(NamedTuple):
    """A job's losses, the first of which is that of step `first`; curves of one `tone` look alike."""

    name: str
    first: int
    losses: Sequence[float]
    tone: int


class Panel(NamedTuple):
    """Curves over the same steps, with a line where the checkpoint is."""

    title: str
    checkpoint: int
    curves: Sequence[Curve]


def figure(panels: Sequence[Panel]) -> str:
    """The panels side by side."""
    rows = max(len(panel.curves) for panel in panels)
    width = len(panels) * (WIDTH + LEFT) + (len(panels) - 1) * GAP + 20
    height = TOP + HEIGHT + 48 + 18 * rows
    body = "\n".join(_panel(panel, LEFT + number * (WIDTH + LEFT + GAP)) for number, panel in enumerate(panels))
    style = "font-family:system-ui,sans-serif;font-size:12px"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" style="{style}">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _panel(panel: Panel, left: int) -> str:
    steps = max(curve.first + len(curve.losses) for curve in panel.curves) - 1
    values = [loss for curve in panel.curves for loss in curve.losses]
    low, high = min(values), max(values)

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + WIDTH * step / steps, TOP + HEIGHT * (high - loss) / (high - low)

    parts = [f'<text x="{left}" y="{TOP - 20}" font-weight="600">{escape(panel.title)}</text>', _axes(left, steps)]
    for number in range(5):
        loss = low + (high - low) * number / 4
        _, y = place(0, loss)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{loss:.2f}</text>')
    x, _ = place(panel.checkpoint - 0.5, low)
    parts.append(
        f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + HEIGHT}" stroke="#999" stroke-dasharray="4 3"/>'
    )
    parts.append(f'<text x="{x + 4:.1f}" y="{TOP + 12}" fill="#777">checkpoint</text>')
    for number, curve in enumerate(panel.curves):
        points = [place(curve.first + at, loss) for at, loss in enumerate(curve.losses)]
        parts.append(_line(points, number, left, curve))
    return "\n".join(parts)


def _axes(left: int, steps: int) -> str:
    bottom = TOP + HEIGHT
    ticks = "".join(
        f'<text x="{left + WIDTH * step / steps:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{step}</text>'
        for step in range(0, steps + 1, max(1, steps // 8))
    )
    return f'<path d="M{left} {TOP}V{bottom}H{left + WIDTH}" fill="none" stroke="#333"/>{ticks}'


def _line(points: Sequence[tuple[float, float]], number: int, left: int, curve: Curve) -> str:
    """A curve, dots of its own size so that equal ones show through each other, and its entry below."""
    colour, size = COLOURS[curve.tone % len(COLOURS)], 7.5 - 0.8 * min(curve.tone, 7)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>' for x, y in points)
    y = TOP + HEIGHT + 44 + 18 * number
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.2"/>'
        f'<g fill="#fff" stroke="{colour}" stroke-width="1.4">{dots}</g>'
        f'<circle cx="{left + 6}" cy="{y - 4}" r="{size:.1f}" fill="#fff" stroke="{colour}" stroke-width="1.4"/>'
        f'<text x="{left + 20}" y="{y}">{escape(curve.name)}</text>'
    )
