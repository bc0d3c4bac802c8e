"""Ends every process of a cluster and takes away what it left, when whoever holds the other end of its input is gone.

Run as a script, by its path, with the standard library alone; the mark of the cluster is its argument. Lines on its
input name what to remove at the end: ``folder PATH``, ``netns NAME``, ``link NAME``. The end of the input, whether
closed by a cluster that is done or by the death of its process, is the order to clean up.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MARK = "UCP_DEMO_MARK"
"""Variable by which the processes of a cluster are known: ``<cluster>/<node>/``, inherited by all they start."""
_PATIENCE = 30.0
_QUIET_LOOKS = 2


class Running(NamedTuple):
    """A process of a cluster."""

    pid: int
    parent: int
    node: str
    local_rank: int | None


def running(mark: str) -> list[Running]:
    """Processes whose mark begins with `mark`, in no order; those of other users are not seen."""
    wanted = f"{MARK}={mark}"
    return _by_proc(wanted) if Path("/proc/self/environ").exists() else _by_ps(wanted)


def kill_all(mark: str, patience: float = _PATIENCE) -> int:
    """SIGKILL to all processes marked with `mark`, until none is seen; how many there were.

    One look can miss what is being started, so it takes two without any. TimeoutError if some outlive `patience`
    seconds.
    """
    killed: set[int] = set()
    quiet, limit = 0, time.monotonic() + patience
    while quiet < _QUIET_LOOKS:
        found = [one.pid for one in running(mark)]
        quiet = 0 if found else quiet + 1
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(found)
        if time.monotonic() > limit:
            raise TimeoutError(f"processes {found} of {mark} cannot be killed")
        time.sleep(0.01)
    return len(killed)


def _by_proc(wanted: str) -> list[Running]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError, IndexError):
                environ = Path("/proc", name, "environ").read_bytes().decode(errors="replace").split("\0")
                if any(one.startswith(wanted) for one in environ):
                    # The name of the command, in brackets, may hold anything: fields are counted from its end.
                    parent = int(Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
                    found.append(_running(int(name), parent, environ))
    return found


def _by_ps(wanted: str) -> list[Running]:
    letters = "axEww" if sys.platform == "darwin" else "axeww"
    told = subprocess.run(["ps", letters, "-o", "pid=,ppid=,command="], capture_output=True, text=True, check=True)
    lines = [line.split() for line in told.stdout.splitlines()]
    return [
        _running(int(words[0]), int(words[1]), words)
        for words in lines
        if any(word.startswith(wanted) for word in words)
    ]


def _running(pid: int, parent: int, environ: list[str]) -> Running:
    values = dict(word.partition("=")[::2] for word in environ)
    local = values.get("LOCAL_RANK", "")
    node = values[MARK].strip("/").rpartition("/")[2]
    return Running(pid, parent, node, int(local) if local.isdigit() else None)


def remove_folder(path: str) -> None:
    """Remove a folder in which a process that was just killed may have written still; it may be gone already."""
    shutil.rmtree(path, ignore_errors=True)


def _remove(kind: str, name: str) -> None:
    if kind == "folder":
        remove_folder(name)
    elif kind in ("netns", "link"):
        what = ["netns"] if kind == "netns" else ["link"]
        subprocess.run(["ip", *what, "del", name], capture_output=True, check=False)


def _main() -> None:
    mark = sys.argv[1]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    left = [line.rstrip("\n").partition(" ") for line in sys.stdin]
    try:
        kill_all(mark)
    finally:
        for kind, _, name in reversed(left):
            _remove(kind, name)


if __name__ == "__main__":
    _main()
