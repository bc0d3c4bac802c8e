"""How much can still be written to a folder, which in memory is less than its file system says."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from ucp.store.errors import translated

_IN_MEMORY = ("tmpfs", "ramfs")


def room_of(path: str) -> int:
    """Free bytes at `path`; of a file system in memory no more than the machine and its control group have left.

    Who writes more to such a file system does not hear of it: the kernel kills processes.
    """
    with translated(path):
        info = os.statvfs(path)
        device = os.stat(path).st_dev
    room = info.f_bavail * info.f_frsize
    if _kind(os.major(device), os.minor(device)) not in _IN_MEMORY:
        return room
    return max(0, min([room, *_available(), *_left_in_group()]))


def _kind(major: int, minor: int) -> str:
    """The type of the file system on a device (proc_pid_mountinfo(5)); "" where nothing tells."""
    for line in _lines("/proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        if before.split()[2] == f"{major}:{minor}":
            return after.split()[0]
    return ""


def _available() -> list[int]:
    """Memory that the machine can give without swapping (proc_meminfo(5))."""
    return [int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]


@dataclass(frozen=True, slots=True)
class _Words:
    """How a version of control groups calls things."""

    most: str
    taken: str
    free: tuple[str, ...]


_V1 = _Words("limit_in_bytes", "usage_in_bytes", ("total_active_file", "total_inactive_file"))
_V2 = _Words("max", "current", ("active_file", "inactive_file", "slab_reclaimable"))


def _left_in_group(table: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> list[int]:
    """What this process's control group and those around it may still take (cgroups(7), both versions).

    Files that are only cached, and what the kernel can free, do not count as taken: they make way.
    """
    found = []
    for line in _lines(table):
        number, kinds, path = line.split(":", 2)
        if number == "0" or "memory" in kinds.split(","):
            words, top = (_V1, f"{mount}/memory") if kinds else (_V2, mount)
            parts = [part for part in path.split("/") if part]
            groups = ["/".join([top, *parts[:count]]) for count in range(len(parts) + 1)]
            found += [left for group in groups if (left := _left(group, words)) is not None]
    return found


def _left(group: str, words: _Words) -> int | None:
    most, taken = ("".join(_lines(f"{group}/memory.{name}")) for name in (words.most, words.taken))
    if not (most.isdigit() and taken.isdigit()):  # "max" is no limit
        return None
    rows = dict(row for line in _lines(f"{group}/memory.stat") if len(row := line.split()) == 2)
    return int(most) - max(0, int(taken) - sum(int(rows.get(name, 0)) for name in words.free))


def _lines(path: str) -> list[str]:
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()
    return []
