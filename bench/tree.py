"""Run a command and account for its whole process tree exactly; started as a script by `bench.measure`.

    python -I -S tree.py RESULT COMMAND...

Linux adds a process's I/O counters, CPU time and peak memory to its parent's when it is waited for. This process is the
reaper of everything the command leaves behind, so that its own counters, once all are gone, are the sums (and, for
memory, the largest process) over the tree. It imports little, to be small itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time

_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    result, command = sys.argv[1], sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = _counters()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _replace(command)
    code, seconds = _reap_all(child, started)
    after, usage = _counters(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "code": code,
        "wall": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "user": usage.ru_utime,
        "peak": usage.ru_maxrss * 1024,
        "read": after["rchar"] - before["rchar"],
        "written": after["wchar"] - before["wchar"],
    }
    with open(result, "w") as file:
        json.dump(found, file)


def _replace(command: list[str]) -> None:
    try:
        os.execvp(command[0], command)
    finally:
        os._exit(127)


def _reap_all(child: int, started: float) -> tuple[int, float]:
    """Exit code of `child` and the seconds until it and every process that it left behind were gone."""
    code = -1
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            return code, time.perf_counter() - started
        if pid == child:
            code = os.waitstatus_to_exitcode(status)


def _counters() -> dict[str, int]:
    with open("/proc/self/io") as file:
        return {key: int(value) for key, value in (line.split(": ") for line in file)}


if __name__ == "__main__":
    main()
