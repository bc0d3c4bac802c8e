"""The page of the matrix, ``docs/conversions.md``: written from outcomes, and read back by the test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.matrix.outcome import ALL, TENSORS, WEIGHTS
from tests.matrix.sources import ROWS
from tests.matrix.targets import COLUMNS

PAGE = Path(__file__).parents[2] / "docs" / "conversions.md"
_START, _STOP = "<!-- matrix -->", "<!-- end of matrix -->"
_SHOWN = {ALL: "●", TENSORS: "◐", WEIGHTS: "○"}
"""How the page shows outcomes."""

Cells = Mapping[tuple[str, str], str]
"""Outcome by label of source and of target."""


def table(cells: Cells) -> str:
    """The table and its footnotes."""
    reasons: dict[str, int] = {}
    lines = ["| from \\ to | " + " | ".join(column.label for column in COLUMNS) + " |"]
    lines.append("|---|" + ":-:|" * len(COLUMNS))
    for row in ROWS:
        shown = []
        for column in COLUMNS:
            found = cells[row.label, column.label]
            if found not in _SHOWN:
                number = reasons.setdefault(found, len(reasons) + 1)
            shown.append(_SHOWN.get(found) or f"[{number}]")
        lines.append(f"| {row.label} | " + " | ".join(shown) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])


def written(cells: Cells) -> str:
    """The page with this table."""
    before, _, rest = PAGE.read_text().partition(_START)
    return f"{before}{_START}\n{table(cells)}\n{_STOP}{rest.partition(_STOP)[2]}"


def expected() -> dict[tuple[str, str], str]:
    """What the page says of each cell: an outcome, or the reason of a refusal."""
    text = PAGE.read_text().partition(_START)[2].partition(_STOP)[0]
    notes: dict[str, str] = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    meaning = {sign: found for found, sign in _SHOWN.items()} | {f"[{n}]": reason for n, reason in notes.items()}
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, *body = rows
    return {(row[0], label): meaning[sign] for row in body for label, sign in zip(header[1:], row[1:], strict=True)}
