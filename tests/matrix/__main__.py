"""Run the whole matrix and write its page: ``python -m tests.matrix``."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

from tests.matrix.outcome import outcome
from tests.matrix.page import PAGE, table, written
from tests.matrix.sources import ROWS, make
from tests.matrix.targets import COLUMNS


def main(kept: str | None = None) -> int:
    """Make the sources (in the folder `kept`, if they are not there), run all cells, write the page."""
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(kept or scratch) / "sources"
        if not folder.exists():
            make(folder)
        cells = {}
        for r, row in enumerate(ROWS):
            for c, column in enumerate(COLUMNS):
                try:
                    found = outcome(row, column, folder, Path(scratch) / f"{r}-{c}")
                except Exception:
                    failures += 1
                    found = "FAILED"
                    print(f"{row.label} -> {column.label}", file=sys.stderr)
                    traceback.print_exc()
                cells[row.label, column.label] = found
    print(table(cells))
    if not failures:
        PAGE.write_text(written(cells))
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
