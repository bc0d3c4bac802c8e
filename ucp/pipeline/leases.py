"""Leases: which watcher is at work on a checkpoint, so that several share the work.

Nothing depends on them: two watchers that convert the same checkpoint write the same bytes. A lease of a process of
this machine that is dead counts for nothing, any other ends with its time.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp.errors import StorageError
from ucp.pipeline.control import FOLDER, VERSION, put_document, read_document
from ucp.store import Store

_LEASES = FOLDER + "leases/"


@dataclass(slots=True)
class Lease:
    """The right to work on a checkpoint until it ends; `renew` it now and then, it costs nothing if it is too early."""

    store: Store
    path: str
    seconds: float
    token: str
    renewed: float

    def renew(self) -> None:
        """Have it last longer, if it has lasted a third of its time; a failure to do so is no harm."""
        if time.monotonic() - self.renewed < self.seconds / 3:
            return
        self.renewed = time.monotonic()
        with suppress(StorageError):
            document, seen = read_document(self.store, self.path)
            if document is not None and document.get("token") == self.token:
                put_document(self.store, self.path, _document(self.seconds, self.token), over=seen)

    def release(self) -> None:
        """Give it back, unless it has become another's."""
        with suppress(StorageError):
            document, _ = read_document(self.store, self.path)
            if document is not None and document.get("token") == self.token:
                self.store.delete(self.path)


def take(store: Store, name: str, seconds: float) -> Lease | None:
    """The lease on a checkpoint; None while another watcher has it."""
    path = f"{_LEASES}{name}.json"
    document, seen = read_document(store, path)
    if document is not None and _holds(document, seconds):
        return None
    token = uuid.uuid4().hex
    if not put_document(store, path, _document(seconds, token), over=seen):
        return None
    return Lease(store, path, seconds, token, time.monotonic())


def tidy(store: Store, seconds: float) -> None:
    """Delete leases of watchers that are dead."""
    for entry in list(store.entries(_LEASES)):
        document, _ = read_document(store, entry.path)
        if document is None or not _holds(document, seconds):
            store.delete(entry.path)


def _document(seconds: float, token: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "token": token,
        "machine": _machine(),
        "process": [os.getpid(), _started(os.getpid())],
        "until": time.time() + seconds,
    }


def _holds(document: dict[str, Any], seconds: float) -> bool:
    """Whether the holder of a lease may still be at work. A clock that is far ahead does not make it last for ever."""
    until = document.get("until")
    left = until - time.time() if isinstance(until, int | float) else 0.0
    if not 0 < left <= 10 * seconds:
        return False
    match document:
        case {"machine": str(machine), "process": [int(pid), str(started)]} if machine == _machine():
            return started == _started(pid) != ""
    return True


def _machine() -> str:
    """Name of the machine since it was started; containers that share neither have names of their own."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _started(pid: int) -> str:
    """When a process was started, in the kernel's words (proc_pid_stat(5), field 22); empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "?"
