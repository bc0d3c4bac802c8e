"""One start of a job at a time on each node: what a second one would remove and overwrite is the first one's."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from contextlib import suppress

from ucp.elastic.meeting import Meeting
from ucp.elastic.private import private_folder
from ucp.errors import ConflictError

_log = logging.getLogger("ucp")

_PAUSE = 0.05
_PATIENCE = 10.0
"""Seconds that an earlier start has to end: it does when it hears that its torchrun is gone."""


class Sole:
    """Holds the lock ``<folder>.lock`` of a node's `folder`, from `take` to `release` or the end of the process.

    It is a lock of this process alone (fcntl(2), ``F_SETLK``): workers that it forks do not hold it when it is gone.
    """

    def __init__(self, folder: str, url: str) -> None:
        self._path, self._url = f"{folder.rstrip('/')}.lock", url
        root, user, job, _ = os.path.abspath(folder).rsplit(os.sep, 3)
        self._above = root, user, job
        self._file: int | None = None

    def take(self, meeting: Meeting) -> None:
        """Be the only start of the job on this node; one that is ending is waited for. Collective over all ranks.

        ConflictError on all of them that names the process which is at work on a node.
        """
        nodes = meeting.gather("nodes", meeting.world.node)
        leads = nodes.index(meeting.world.node) == meeting.world.rank
        patience = min(_PATIENCE, meeting.timeout / 2)
        holder = None if not leads or self._taken(patience) else f"node {meeting.world.node}, {self._holder()}"
        holders = [one for one in meeting.gather("sole", holder) if one is not None]
        if holders:
            raise ConflictError(
                f"{self._url}: this job is at work already: {'; '.join(holders)}",
                hint="a job is started once: end what is left of the other start, or give this one another url "
                "(and job=, if it has one)",
            )

    def release(self) -> None:
        """Leave the node to whoever comes next, and no file behind."""
        if self._file is not None:
            # As long as it is locked: whoever locks it afterwards sees that it is no file of that name any more.
            with suppress(OSError):
                os.unlink(self._path)
            os.close(self._file)
            self._file = None
            job = os.path.dirname(self._path)
            with suppress(OSError):  # other nodes of this job, or other jobs, have theirs there
                os.rmdir(job)
                os.rmdir(os.path.dirname(job))

    def _taken(self, patience: float) -> bool:
        deadline = time.monotonic() + patience
        while not self._tried():
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE)
        return True

    def _tried(self) -> bool:
        """Whether this process may go on: the lock is its own now, or cannot be had by anybody."""
        file = -1
        try:
            private_folder(*self._above)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            named = os.fstat(file).st_ino == os.stat(self._path).st_ino
        except OSError as error:
            if file >= 0:
                os.close(file)
            if isinstance(error, BlockingIOError | PermissionError | FileNotFoundError):
                return False
            _log.warning("%s: that it is started once is not checked on this node: %s", self._url, error)
            return True
        if not named:
            os.close(file)
            return False
        self._file = file
        with suppress(OSError):  # it only makes messages say more
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps({"process": os.getpid(), "since": time.time()}).encode(), 0)
        return True

    def _holder(self) -> str:
        with suppress(OSError, ValueError, KeyError, TypeError), open(self._path, "rb") as file:
            doc = json.loads(file.read(1024))
            return f"process {doc['process']} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(doc['since']))}"
        return "a process that is not known"
