"""Rules in columns: names, layouts, arrows and targets under each other, in lines that are not too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucp.lang.ast import Rule, Side
from ucp.lang.format_parts import clauses_text, layout_text, pattern_text, reduces_text, source_text

WIDEST = 120
"""The longest line, where a break is possible."""

_MOST_IN_COLUMNS = 1000


@dataclass(frozen=True, slots=True)
class _Row:
    """A rule's parts as text."""

    name: str
    layout: str
    arrow: str
    targets: tuple[tuple[str, str], ...]
    clauses: str


@dataclass(frozen=True, slots=True)
class _Columns:
    """How wide each column is."""

    name: int = 0
    layout: int = 0
    arrow: int = 0
    target: int = 0


def rule_lines(rules: Sequence[Rule], *, indent: int) -> list[list[str]]:
    """The lines of each of `rules`, which follow each other without a blank line, in common columns."""
    rows = [_row(rule) for rule in rules]
    if len(rows) > _MOST_IN_COLUMNS:
        return [_one_line(row, _Columns(), indent) for row in rows]
    alone = [row for row in rows if _fits(_one_line(row, _columns([row]), indent))]
    together = _columns(alone)
    kept = [row for row in alone if _fits(_one_line(row, together, indent))]
    columns, chosen = _columns(kept), set(map(id, kept))
    return [_one_line(row, columns, indent) if id(row) in chosen else _broken(row, columns, indent) for row in rows]


def _row(rule: Rule) -> _Row:
    layout = "" if rule.source.layout is None else layout_text(rule.source.layout)
    geometry = " ".join(filter(None, (layout, reduces_text(rule.reduces))))
    name = source_text(rule.source.name, layout=geometry.startswith("[") or not geometry)
    clauses = clauses_text(rule.on, rule.conditions, optional=rule.optional, lossy=rule.lossy)
    return _Row(name, geometry, rule.arrow, tuple(map(_target, rule.targets)), clauses)


def _target(side: Side) -> tuple[str, str]:
    return pattern_text(side.name), "" if side.layout is None else layout_text(side.layout)


def _columns(rows: Sequence[_Row]) -> _Columns:
    """The columns that hold all of `rows`."""
    return _Columns(
        max((len(row.name) for row in rows), default=0),
        max((len(row.layout) for row in rows), default=0),
        max((len(row.arrow) for row in rows), default=0),
        max((len(name) for row in rows for name, layout in row.targets if layout), default=0),
    )


def _fits(lines: Sequence[str]) -> bool:
    return all(len(line) <= WIDEST for line in lines)


def _one_line(row: _Row, columns: _Columns, indent: int) -> list[str]:
    """Source, arrow and first target on one line, further targets on lines below it."""
    parts = [row.name.ljust(columns.name)]
    if columns.layout or row.layout:
        parts.append(row.layout.ljust(columns.layout))
    return _with_targets(row, " " * indent + "  ".join(parts) + "  ", columns)


def _broken(row: _Row, columns: _Columns, indent: int) -> list[str]:
    """The source on a line of its own, the arrow on the next one."""
    first = f"{row.name.ljust(columns.name)}  {row.layout}"
    if indent + len(first) > WIDEST:
        first = f"{row.name}  {row.layout}"
    return [" " * indent + first.rstrip(), *_with_targets(row, " " * (indent + 4), _columns([row]))]


def _with_targets(row: _Row, lead: str, columns: _Columns) -> list[str]:
    lead += row.arrow.ljust(columns.arrow) + "  "
    lines = []
    for number, (name, layout) in enumerate(row.targets):
        text = f"{name.ljust(columns.target)} {layout}" if layout else name
        lines.append((" " * len(lead) if number else lead) + text + ",")
    lines[-1] = lines[-1][:-1] + (f"  {row.clauses}" if row.clauses else "")
    return lines
