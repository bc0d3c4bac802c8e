"""Threads that wait for requests: one pool per process, made anew in a forked one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def spread(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run `jobs`, at most `threads` of this process at once; the first error, when all that began have ended."""
    if len(jobs) <= 1:
        for job in jobs:
            job()
        return
    futures: list[Future[None]] = []
    for job in jobs:
        future = _submit(job, threads)
        if future is not None:
            futures.append(future)
    errors = [error for error in map(_outcome, futures) if error is not None]
    if errors:
        raise errors[0]


def _submit(job: Callable[[], None], threads: int) -> Future[None] | None:
    """Hand `job` to the pool, or run it here where the interpreter is ending and takes no more work."""
    try:
        return _pool(threads).submit(job)
    except RuntimeError:
        job()
        return None


def _outcome(future: Future[None]) -> BaseException | None:
    """The error of a job. The jobs fill buffers of the caller, so each is waited for, whatever became of the others."""
    return future.exception()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="ucp-cloud")
        return _pools[threads]


def _after_fork() -> None:
    """The threads stay behind in the parent; the lock may be held by one of them."""
    global _lock  # noqa: PLW0603 - a lock that another thread held at the fork is never released here
    _lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_after_fork)
