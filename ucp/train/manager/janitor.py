"""The one thread that deletes checkpoints of a run, on rank 0."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ucp.errors import ConflictError
from ucp.lifecycle.gc import gc
from ucp.lifecycle.shelf import Shelf
from ucp.train.manager.keep import Keep

T = TypeVar("T")
_log = logging.getLogger("ucp")


class Janitor:
    """Deletes, in a thread that starts with the first work, what `keep` does not keep of the folder `shelf`.

    With a `grace` period, in seconds, it also collects what the checkpoints shared that are gone.
    """

    def __init__(self, shelf: Shelf, keep: Keep, *, grace: float | None = None) -> None:
        self.shelf, self.keep, self.grace = shelf, keep, grace
        self._pool: ThreadPoolExecutor | None = None

    def ask(self, work: Callable[[], T]) -> T:
        """What `work` returns when everything asked for before is done."""
        return self._thread.submit(work).result()

    def committed(self, step: int) -> None:
        """The checkpoint of `step` is complete: delete, in the background, what may go now."""
        if self.keep.latest is not None:
            self._thread.submit(self._delete, step)

    def close(self) -> None:
        """Wait for all that was asked for."""
        self.dismiss(wait=True)

    def dismiss(self, *, wait: bool = False) -> None:
        """End the thread."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=wait)

    @property
    def _thread(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="ucp-retention")
        return self._pool

    def _delete(self, newest: int) -> None:
        """Delete what may go now that `newest` is committed."""
        shelf = self.shelf
        try:
            contents = shelf.contents()
            gone = self.keep.expendable(contents.saved, newest=newest)
            cut_short = (step for step in contents.incomplete if step < newest and step not in contents.others)
            for step in (*gone, *cut_short):
                shelf.remove(step)
            for path in shelf.strays(newest):
                shelf.store.delete(path)
            if self.grace is not None:
                self._collect(shelf, self.grace)
        except Exception:  # noqa: BLE001  training does not end because of it, and the next commit tries again
            _log.warning("%s: old checkpoints could not be deleted", shelf.address, exc_info=True)

    @staticmethod
    def _collect(shelf: Shelf, grace: float) -> None:
        try:
            gc(shelf.address, grace=grace)
        except ConflictError as error:  # somebody else does so
            _log.info("%s", error)
