"""The processes that a process has started, and those that these have."""

from __future__ import annotations

from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Those of `pid` that run now, each before its own."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            child = int(path.parent.name)
            found += [child, *descendants(child)]
    return found
