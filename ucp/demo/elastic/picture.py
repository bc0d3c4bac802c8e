"""What a run went through as an SVG: its ranks and its loss over time, and its loss beside that of the undisturbed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LEFT, TOP, GAP = 760, 56, 40, 58
HEIGHTS = (130, 190, 190)
STYLE = "font-family:system-ui,sans-serif;font-size:12px"
BLUE, RED, GREY, BAND = "#1f77b4", "#d62728", "#b5b5b5", "#fbe9e7"


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was done: when, in seconds from the start, and its loss; not `counted` if it was done again later."""

    time: float
    step: int
    loss: float
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Story:
    """What a run went through. Times are seconds from the start.

    `worlds` are (from, until, ranks, layout) of each stretch of training, `marks` are (time, what happened), and
    `undisturbed` are the losses of the run that nothing happened to, from step 1 on.
    """

    worlds: Sequence[tuple[float, float, int, str]]
    steps: Sequence[Done]
    marks: Sequence[tuple[float, str]]
    undisturbed: Sequence[float]

    @property
    def end(self) -> float:
        """When the last step was done."""
        return max((until for _, until, _, _ in self.worlds), default=1.0)

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """When no step was being done: before the first stretch, and from the end of each to the next."""
        ends = [0.0, *(until for _, until, _, _ in self.worlds)]
        return [(before, start) for before, (start, _, _, _) in zip(ends, self.worlds, strict=False) if start > before]


def picture(story: Story, title: str) -> str:
    """The picture."""
    tops = [TOP + 22 + sum(HEIGHTS[:number]) + GAP * number for number in range(3)]
    height = tops[2] + HEIGHTS[2] + 56
    body = "\n".join(
        [
            f'<text x="{LEFT}" y="22" font-weight="600" font-size="14">{escape(title)}</text>',
            *_ranks(story, tops[0]),
            *_over_time(story, tops[1]),
            *_over_steps(story, tops[2]),
        ]
    )
    width = LEFT + WIDTH + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" style="{STYLE}">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


@dataclass(frozen=True, slots=True)
class _Panel:
    """A rectangle of the picture and what its edges stand for."""

    top: float
    height: float
    right: float
    low: float
    high: float
    left: float = 0.0

    def x(self, value: float) -> float:
        return LEFT + WIDTH * (value - self.left) / ((self.right - self.left) or 1.0)

    def y(self, value: float) -> float:
        return self.top + self.height * (self.high - value) / ((self.high - self.low) or 1.0)

    def frame(self, title: str, unit: str, values: Iterable[float], form: str) -> Iterator[str]:
        bottom = self.top + self.height
        yield f'<text x="{LEFT}" y="{self.top - 8}" fill="#333">{escape(title)}</text>'
        yield f'<path d="M{LEFT} {self.top}V{bottom}H{LEFT + WIDTH}" fill="none" stroke="#333"/>'
        for value in values:
            y = self.y(value)
            yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{value:{form}}</text>'
            yield f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#eee"/>'
        for value in _ticks(self.left, self.right):
            y = bottom + 16
            yield f'<text x="{self.x(value):.1f}" y="{y}" text-anchor="middle" fill="#555">{value:g}{unit}</text>'


def _ticks(first: float, last: float) -> list[float]:
    """Round numbers between the two, at most nine."""
    span = last - first
    every = next(size for size in (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 10**9) if span <= 8 * size)
    return [number for number in range(0, int(last) + 1, every) if number >= first]


def _ranks(story: Story, top: float) -> Iterator[str]:
    """Ranks over time: a bar for each stretch of training, with its layout, and what happened."""
    most = max((ranks for _, _, ranks, _ in story.worlds), default=1)
    panel = _Panel(top, HEIGHTS[0], story.end, 0, most + 1)
    yield from _bands(story, panel)
    yield from panel.frame("ranks that train", " s", range(0, most + 1, 1 if most < 6 else 2), "d")
    for start, until, ranks, layout in story.worlds:
        x, y = panel.x(start), panel.y(ranks)
        wide, high = panel.x(until) - x, panel.y(0) - y
        shown = max(wide, 1)
        yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{shown:.1f}" height="{high:.1f}" fill="{BLUE}" opacity=".3"/>'
        yield f'<path d="M{x:.1f} {y:.1f}h{shown:.1f}" stroke="{BLUE}" stroke-width="2.5"/>'
        if wide > 6 * len(layout):
            place = f'x="{x + wide / 2:.1f}" y="{y + 15:.1f}"'
            yield f'<text {place} text-anchor="middle" fill="#12456b">{escape(layout)}</text>'
    yield from _marks(story, panel)


def _marks(story: Story, panel: _Panel) -> Iterator[str]:
    """A line for each thing that happened; texts that would touch are told one below the other."""
    ends: list[float] = []
    for time, text in story.marks:
        x, wide = panel.x(time), 5.8 * len(text) + 8
        left = min(x + 3, LEFT + WIDTH - wide)
        row = next((number for number, end in enumerate(ends) if end <= left), len(ends))
        ends[row : row + 1] = [left + wide]
        y = panel.top + 11 + 13 * row
        yield f'<path d="M{x:.1f} {panel.top}v{panel.height}" stroke="{RED}" stroke-dasharray="3 3"/>'
        yield f'<text x="{left:.1f}" y="{y:.1f}" fill="{RED}" font-size="11">{escape(text)}</text>'


def _bands(story: Story, panel: _Panel) -> Iterator[str]:
    for start, until in story.gaps:
        x, wide = panel.x(start), panel.x(until) - panel.x(start)
        yield f'<rect x="{x:.1f}" y="{panel.top}" width="{wide:.1f}" height="{panel.height}" fill="{BAND}"/>'


def _over_time(story: Story, top: float) -> Iterator[str]:
    """The loss as it came: steps that were done again later are grey."""
    panel = _Panel(top, HEIGHTS[1], story.end, *_range(story))
    yield from _bands(story, panel)
    yield from panel.frame("loss over time (grey: done again; red: no step is being done)", " s", _levels(panel), ".2f")
    for time, _ in story.marks:
        yield f'<path d="M{panel.x(time):.1f} {panel.top}v{panel.height}" stroke="{RED}" stroke-dasharray="3 3"/>'
    for done in sorted(story.steps, key=lambda done: done.counted):
        colour = BLUE if done.counted else GREY
        yield f'<circle cx="{panel.x(done.time):.1f}" cy="{panel.y(done.loss):.1f}" r="2.2" fill="{colour}"/>'


def _over_steps(story: Story, top: float) -> Iterator[str]:
    """The loss of every step beside that of the undisturbed run."""
    last = max([len(story.undisturbed), *(done.step for done in story.steps), 2])
    panel = _Panel(top, HEIGHTS[2], last, *_range(story), left=1)
    beside = " (circles: the run that nothing happened to; line: this run)" if story.undisturbed else ""
    title = f"loss over steps{beside}"
    yield from panel.frame(title, "", _levels(panel), ".2f")
    for step, loss in enumerate(story.undisturbed, 1):
        place = f'cx="{panel.x(step):.1f}" cy="{panel.y(loss):.1f}"'
        yield f'<circle {place} r="3.4" fill="none" stroke="#555"/>'
    counted = sorted((done for done in story.steps if done.counted), key=lambda done: done.step)
    points = " ".join(f"{panel.x(done.step):.1f},{panel.y(done.loss):.1f}" for done in counted)
    yield f'<polyline points="{points}" fill="none" stroke="{BLUE}" stroke-width="1.6"/>'


def _range(story: Story) -> tuple[float, float]:
    losses = [*story.undisturbed, *(done.loss for done in story.steps)] or [0.0, 1.0]
    return min(losses), max(losses)


def _levels(panel: _Panel) -> list[float]:
    return [panel.low + (panel.high - panel.low) * number / 4 for number in range(5)]
