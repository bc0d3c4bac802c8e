"""Executors: run the tasks of a plan in threads of this process, or in a pool of processes.

Both hand finished objects to the caller one by one, as they finish, so that they can be journalled.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from ucp.catalog import Checksum
from ucp.errors import InterruptedRunError
from ucp.plan import Task
from ucp.run.integrity import Ledger, Spans
from ucp.run.journal import Done
from ucp.run.progress import Counter
from ucp.run.worker import Advance, write_object
from ucp.store import Store
from ucp.store.traffic import TRAFFIC, Traffic

T = TypeVar("T")
_POLL_SECONDS = 0.1


def default_workers(*stores: Store) -> int:
    """Cores that this process may use, at most 16: more does not help a disk; as many as pay for one of `stores`."""
    return max(min(16, len(os.sched_getaffinity(0))), *(store.parallel for store in stores), 1)


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

    The first error cancels what has not started and is raised when what has started has stopped. InterruptedRunError if
    a process dies.
    """
    if processes:
        running = _in_processes(tasks, _Job(source, destination, tuple(checksums)), counter, workers)
    else:
        running = _in_threads(tasks, _Job(source, destination, checksums), counter, workers)
    for done in running:
        if done is not None:
            counter.finish_object()
        yield done


def as_finished(futures: Collection[Future[T]]) -> Iterator[Future[T] | None]:
    """`futures` as they finish, and None now and then.

    Takes the same time for each of any number of futures, as `concurrent.futures.wait` does not.
    """
    finished: SimpleQueue[Future[T]] = SimpleQueue()
    for future in futures:
        future.add_done_callback(finished.put)
    left = len(futures)
    while left:
        try:
            yield finished.get(timeout=_POLL_SECONDS)
            left -= 1
        except Empty:
            yield None


@dataclass(frozen=True, slots=True)
class _Job:
    """What all tasks of a run have in common."""

    source: Store
    destination: Store
    checksums: Sequence[Checksum]

    def run(self, spans: Spans, task: Task, advance: Advance) -> Done:
        ledger = Ledger(spans)
        digests, moved = write_object(self.source, self.destination, task, ledger=ledger, advance=advance)
        return Done(task.object, digests, tuple(ledger.pieces()), moved)


def _in_threads(tasks: Sequence[Task], job: _Job, counter: Counter, workers: int) -> Iterator[Done | None]:
    spans = Spans(job.checksums)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ucp")
    try:
        futures = [pool.submit(job.run, spans, task, counter.advance) for task in tasks]
        for future in as_finished(futures):
            yield None if future is None else future.result()
    finally:
        counter.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _in_processes(tasks: Sequence[Task], job: _Job, counter: Counter, workers: int) -> Iterator[Done | None]:
    context = get_context("forkserver")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(job, stop))
    try:
        futures = {pool.submit(_in_process, task): task.nbytes for task in tasks}
        for future in as_finished(futures):
            if future is not None:
                done, traffic = future.result()
                TRAFFIC.add(traffic)
                counter.advance(futures[future])
                yield done
            yield None
    except BrokenProcessPool as error:
        raise InterruptedRunError(
            f"{job.destination.url}: a worker process died; if memory ran out, fewer workers need less",
            hint="run the same command again: it resumes",
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _Event(Protocol):
    """What pool processes need of an event of `multiprocessing`."""

    def is_set(self) -> bool: ...


_process: tuple[_Job, Spans, Advance]


def _start(job: _Job, stop: _Event) -> None:
    """Begin a pool process. Ctrl-C reaches all processes of a terminal; the first one alone decides what it means."""
    global _process  # noqa: PLW0603 - a pool process has one job for life
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def advance(_: int) -> None:
        if stop.is_set():
            raise InterruptedRunError("stopped", hint="run the same command again: it resumes")

    _process = (job, Spans(job.checksums), advance)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this process when the run's first one is no more: the next run must find nobody writing."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_process(task: Task) -> tuple[Done, Traffic]:
    job, spans, advance = _process
    return job.run(spans, task, advance), TRAFFIC.drain()
