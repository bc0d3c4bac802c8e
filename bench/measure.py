"""Measure commands: wall and CPU seconds, bytes read and written, peak memory, and what they leave and left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PERIOD = 0.2
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one command. Bytes and seconds; `read`, `written`, `cpu` are sums over the process tree.

    `peak` is the largest resident set of any single process, exact; it counts shared pages and mapped page cache.
    `peak_sum` is the largest sum of resident sets of all processes that were alive at once, sampled, so shared pages
    count several times. `temporary` is the largest size, sampled, of files that were gone at the end.
    """

    wall: float
    cpu: float
    read: int
    written: int
    peak: int
    peak_sum: int
    temporary: int
    files: int
    output: int
    stdout: str


class CommandFailed(RuntimeError):
    """The measured command did not succeed; the message holds the end of what it said."""


def measure(command: Sequence[str], *, output: Path) -> Measurement:
    """Run `command`, which writes into the folder `output`, and account for it. CommandFailed if it fails."""
    with tempfile.TemporaryDirectory(prefix="ucp-bench-") as scratch:
        result, log = Path(scratch, "result.json"), Path(scratch, "log")
        script = str(Path(__file__).with_name("tree.py"))
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", script, str(result), *command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            sampler = _Sampler(process.pid, output)
            said, _ = process.communicate()
            sampler.stop()
        found = json.loads(result.read_text())
        if found["code"] != 0:
            tail = (said + log.read_text(errors="replace"))[-3000:]
            raise CommandFailed(f"{' '.join(command)} ended with code {found['code']}:\n{tail}")
    left = dict(_files(output))
    return Measurement(
        wall=found["wall"],
        cpu=found["cpu"],
        read=found["read"],
        written=found["written"],
        peak=found["peak"],
        peak_sum=sampler.peak,
        temporary=sampler.temporary(left),
        files=len(left),
        output=sum(left.values()),
        stdout=said,
    )


class _Sampler:
    """Looks at a process tree and a folder several times a second."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.peak = 0
        self._pid, self._folder = pid, folder
        self._seen: list[dict[str, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the sampling."""
        self._stop.set()
        self._thread.join()

    def temporary(self, left: dict[str, int]) -> int:
        """Most bytes seen at once in files that are not among those `left`."""
        return max((sum(n for path, n in files.items() if path not in left) for files in self._seen), default=0)

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD):
            self.peak = max(self.peak, sum(map(_resident, _descendants(self._pid))))
            self._seen.append(dict(_files(self._folder)))


def _descendants(pid: int) -> Iterator[int]:
    """Children of `pid` and theirs, of all threads."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for task in tasks:
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            yield child
            yield from _descendants(child)


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Paths and sizes of the files under `folder` that exist while it looks."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
            continue
        try:
            yield entry.path, entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue


def warm(paths: Sequence[Path]) -> int:
    """Bring files into the page cache by reading them, after writing back what others left dirty; bytes read."""
    os.sync()
    buffer, total = bytearray(_CHUNK), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total
