"""Convert a checkpoint in a process that kills itself with SIGKILL at its k-th storage operation.

    python -m tests.run.crash SOURCE FOLDER FAMILY RUN…

A RUN is ``name=k,k,…``: children with these limits run one after the other on destination FOLDER/name, each resuming
what the one before left. A limit of 0 is never reached: that child runs to its end. Prints a JSON line per child.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import wraps

from ucp.converter import converter
from ucp.errors import NotFoundError
from ucp.run.convert import convert
from ucp.store import local, local_write, open_store

OPERATIONS = 0


def kill_at(limit: int) -> None:
    """Make the process kill itself in the middle of operation number `limit`."""

    def counted(method, *, halve):
        @wraps(method)
        def wrapper(self, first, data, *args, **options):
            global OPERATIONS  # noqa: PLW0603 - one process, one count
            OPERATIONS += 1
            if limit == OPERATIONS:
                if halve:
                    method(self, first, memoryview(data)[: len(data) // 2], *args, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return method(self, first, data, *args, **options)

        return wrapper

    local_write.FileWriter.write_at = counted(local_write.FileWriter.write_at, halve=True)
    local.LocalStore.put = counted(local.LocalStore.put, halve=False)
    local.LocalStore.delete = _counted_delete(local.LocalStore.delete, limit)


def _counted_delete(method, limit):
    @wraps(method)
    def wrapper(self, path):
        global OPERATIONS  # noqa: PLW0603 - one process, one count
        OPERATIONS += 1
        if limit == OPERATIONS:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, path)

    return wrapper


def readable(url: str, family: str) -> bool:
    """Whether the family's reader takes `url` for a checkpoint."""
    store = open_store(url)
    try:
        if not converter(family).detect(store):
            return False
        converter(family).read(store)
    except NotFoundError:
        return False
    return True


def run_child(source: str, destination: str, family: str, limit: int) -> dict[str, object]:
    """Fork a child that dies at operation `limit`; what became of it."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        kill_at(limit)
        report = convert(source, destination, to=family, workers=1)
        os.write(into, json.dumps([OPERATIONS, report.resumed_objects, report.already_done]).encode())
        os._exit(0)
    os.close(into)
    _, status = os.waitpid(child, 0)
    said = os.read(out, 1000)
    os.close(out)
    operations, resumed, already = json.loads(said) if said else (limit, 0, False)
    return {
        "limit": limit,
        "killed": os.WIFSIGNALED(status),
        "exit": os.waitstatus_to_exitcode(status),
        "readable": readable(destination, family),
        "operations": operations,
        "resumed": resumed,
        "already": already,
    }


def main(argv: list[str]) -> None:
    """See the module's docstring."""
    source, folder, family, *runs = argv[1:]
    for name, limits in (run.split("=") for run in runs):
        for limit in map(int, limits.split(",")):
            print(json.dumps(run_child(source, f"{folder}/{name}", family, limit)), flush=True)


if __name__ == "__main__":
    main(sys.argv)
