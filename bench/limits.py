"""The machine's own limits, to hold results against: memory copy, warm read, page-cache write, and write with fsync.

    python -m bench.limits [--folder DIR] [--rounds N]

All move 1 GiB in blocks of 4 MiB. Files are written in calls of 256 KiB and, to show what that matters, of 4 MiB: on
virtual machines that hand free memory back to their host, large calls get memory that must be faulted in anew. Each
bandwidth is that of all threads together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.make import CACHE
from bench.report import table

_BLOCK = 4 << 20
_PIECE = 256 << 10
_TOTAL = 1 << 30

_SOURCE = np.full((128, _BLOCK), 7, np.uint8)

Limits = dict[str, list[float]]
"""Bandwidths in bytes per second, one per round, by name."""


def measure_limits(folder: Path, *, rounds: int = 3, total: int = _TOTAL) -> Limits:
    """Measure each limit `rounds` times with `total` bytes, and with one and with as many threads as cores."""
    folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    found: Limits = {}
    for _ in range(rounds):
        for threads in sorted({1, cores}):
            for name, work in _WORK.items():
                speed = _timed(work, folder, threads, total // threads // _BLOCK)
                found.setdefault(f"{name}, {threads} thread{'s' * (threads > 1)}", []).append(speed)
    for thread in range(cores):
        _path(folder, thread).unlink(missing_ok=True)
    return found


def limits_table(limits: Limits) -> str:
    """Markdown: medians, least and most, in GB/s."""
    rows = [
        [name, f"{statistics.median(speeds) / 1e9:.2f}", f"{min(speeds) / 1e9:.2f}-{max(speeds) / 1e9:.2f}"]
        for name, speeds in limits.items()
    ]
    return table(["limit", "GB/s", "range"], rows)


Work = Callable[[Path, int], None]
"""Moves that many blocks, of or to the file at the path where it is about files."""


def _timed(work: Work, folder: Path, threads: int, blocks: int) -> float:
    """Bytes per second of `work` in `threads` threads, `blocks` blocks each."""
    os.sync()
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        running = [pool.submit(work, _path(folder, i), blocks) for i in range(threads)]
        for future in running:
            future.result()
        return threads * blocks * _BLOCK / (time.perf_counter() - started)


def _path(folder: Path, thread: int) -> Path:
    return folder / f"limits-{thread}.bin"


def _copy(_: Path, blocks: int) -> None:
    # The source is far larger than any cache, or this would be the speed of the cache.
    target = np.empty(_BLOCK, np.uint8)
    for block in range(blocks):
        np.copyto(target, _SOURCE[block % len(_SOURCE)])


def _write(path: Path, blocks: int, *, durable: bool = False, piece: int = _PIECE) -> None:
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for _ in range(blocks):
            for start in range(0, _BLOCK, piece):
                os.write(fd, _SOURCE[0, start : start + piece].data)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def _write_durably(path: Path, blocks: int) -> None:
    _write(path, blocks, durable=True)


def _write_large(path: Path, blocks: int) -> None:
    _write(path, blocks, piece=_BLOCK)


def _read(path: Path, blocks: int) -> None:
    target = bytearray(_BLOCK)
    fd = os.open(path, os.O_RDONLY)
    try:
        for block in range(blocks):
            os.preadv(fd, [target], block * _BLOCK)
    finally:
        os.close(fd)


_WORK: dict[str, Work] = {
    "memory copy": _copy,
    "write to the page cache": _write,
    "the same, 4 MiB a call": _write_large,
    "write and fsync": _write_durably,
    "read from the page cache": _read,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the machine's own limits.")
    parser.add_argument("--folder", type=Path, default=CACHE)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(limits_table(measure_limits(given.folder / "limits", rounds=given.rounds)))


if __name__ == "__main__":
    main()
