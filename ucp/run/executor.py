"""Executors: run the tasks of a plan in threads of this process, or in a pool of processes.

Both hand finished objects to the caller one by one, as they finish, so that they can be journalled.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context

from ucp.catalog import Checksum
from ucp.plan import Task
from ucp.run.integrity import Ledger, Spans
from ucp.run.journal import Done
from ucp.run.progress import Counter
from ucp.run.worker import Advance, write_object
from ucp.store import Store

_POLL_SECONDS = 0.1


def default_workers() -> int:
    """Cores that this process may use, at most 16: more does not help a disk."""
    return min(16, len(os.sched_getaffinity(0)))


def run_tasks(
    tasks: Sequence[Task],
    *,
    source: Store,
    destination: Store,
    checksums: Sequence[Checksum],
    counter: Counter,
    workers: int,
    processes: bool,
) -> Generator[Done | None, None, None]:
    """Run `tasks`; yields each finished object, and None now and then so that the caller can show progress.

    The first error cancels what has not started and is raised when what has started has stopped.
    """
    if processes:
        initial = (source, destination, tuple(checksums))
        context = get_context("forkserver")
        pool: Executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=initial)
        submitted = {pool.submit(_in_process, task): task.nbytes for task in tasks}
    else:
        spans = Spans(checksums)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="ucp")
        submitted = {pool.submit(_run, source, destination, spans, task, counter.advance): 0 for task in tasks}
    try:
        yield from _collect(submitted, counter)
    finally:
        counter.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(submitted: dict[Future[Done], int], counter: Counter) -> Iterator[Done | None]:
    """Finished objects; `submitted` says how many bytes to count when one is finished."""
    waiting = set(submitted)
    while waiting:
        finished, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in finished:
            done = future.result()
            counter.advance(submitted[future])
            counter.finish_object()
            yield done
        yield None


def _run(source: Store, destination: Store, spans: Spans, task: Task, advance: Advance) -> Done:
    ledger = Ledger(spans)
    digests = write_object(source, destination, task, ledger=ledger, advance=advance)
    return Done(task.object, digests, tuple(ledger.pieces()))


_process: tuple[Store, Store, Spans]


def _start(source: Store, destination: Store, checksums: tuple[Checksum, ...]) -> None:
    global _process  # noqa: PLW0603 - a pool process has one job for life
    _process = (source, destination, Spans(checksums))


def _in_process(task: Task) -> Done:
    return _run(*_process, task, lambda _: None)
