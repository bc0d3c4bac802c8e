"""Tables in Markdown, and the few facts about the machine that numbers depend on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded, all but the first aligned to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [_line(head, widths), "|" + "|".join(_rule(i, width) for i, width in enumerate(widths)) + "|"]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"


def _rule(column: int, width: int) -> str:
    return "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"


def spread(values: Sequence[float], unit: float = 1.0, digits: int = 2) -> str:
    """``median (least-most)`` in `unit`; the range is left out for one value."""
    middle = f"{statistics.median(values) / unit:.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values) / unit:.{digits}f}-{max(values) / unit:.{digits}f})"


def machine() -> str:
    """One line: processor, cores, memory and system, without names of hosts or paths."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, Linux {platform.release().split('-')[0]}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system(folder: Path) -> str:
    """Type of the file system that holds `folder`."""
    best, kind = "", "?"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, name = line.split()[:3]
        if folder.absolute().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, name
    return kind


def load() -> float:
    """Processes that are running or waiting now: what others do to the numbers."""
    return os.getloadavg()[0]
