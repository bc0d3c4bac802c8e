"""Conversion: read a checkpoint of one family, write it as another; interrupted anywhere, it resumes.

A conversion is a plan and a journal. Nothing in the destination counts as a checkpoint until its root object is put,
which happens last, after every byte read was set against the source's own digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ucp.catalog import Catalog
from ucp.converter import Target, converter
from ucp.errors import InterruptedRunError
from ucp.mapping import ProgramLike, read_source
from ucp.plan import Plan
from ucp.run import journal as journals
from ucp.run.destination import RECORD, State, Wanted, check_whole, clear, examine, lost, refuse_overlap
from ucp.run.executor import default_workers, run_tasks
from ucp.run.integrity import Ledger, Spans
from ucp.run.journal import Done, Journal
from ucp.run.progress import Counter, Progress, Report
from ucp.run.unchanged import check_unchanged
from ucp.store import Store, open_store

_FLUSH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that is ready to run; nothing has been written.

    `state` is ``new``, ``partial`` (an earlier run was cut short and will be resumed) or ``done``. `wanted` is what
    will be there in the end; with `restart` the remains of another conversion will be thrown away.
    """

    catalog: Catalog
    target: Target
    plan: Plan
    to: str
    source: Store
    destination: Store
    wanted: Wanted
    state: State
    restart: bool = False

    @property
    def source_url(self) -> str:
        """Where the source lies."""
        return self.source.url

    @property
    def destination_url(self) -> str:
        """Where the result will lie."""
        return self.destination.url

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks of the reader, then those of the target, such as what its form cannot hold."""
        return (*self.catalog.notes, *self.target.notes)


def prepare(
    source: str,
    destination: str,
    *,
    to: str = "universal",
    family: str | None = None,
    check: bool = True,
    restart: bool = False,
    program: ProgramLike | None = None,
    sizes: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    read_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Conversion:
    """Read the source's metadata and plan its conversion to family `to`, without writing anything.

    A conversion `program` puts the source's tensors together and names them, as in `ucp.open`; `sizes` and `flags` are
    the program's. `check` compares replicas and low-precision copies with the tensors; `restart` throws away what an
    earlier, different run left unfinished. `read_options` go to the source's converter, `options` to the target's.
    Raises what reading raises; UsageError if the destination is the source or holds something else.
    """
    catalog, source_store = read_source(
        source, family=family, program=program, sizes=sizes, flags=flags, **(read_options or {})
    )
    destination_store = open_store(destination)
    refuse_overlap(source_store, destination_store)
    if not check:
        catalog = catalog.unchecked()
    target = converter(to).target(catalog, source_store, **options)
    plan = Plan.of(target.tasks)
    fingerprint = _fingerprint(catalog, plan, to, check=check, read_options=dict(read_options or {}), options=options)
    wanted = Wanted(target.root, {task.object: task.size for task in plan.tasks}, fingerprint)
    state = examine(destination_store, wanted, restart=restart)
    return Conversion(catalog, target, plan, to, source_store, destination_store, wanted, state, restart)


def convert(
    source: str,
    destination: str,
    *,
    workers: int | None = None,
    processes: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Report:
    """Convert the checkpoint at `source` and write the result to `destination`; resumes what was cut short.

    `options` are those of `prepare` (``to``, ``family``, ``program``, ``check``, …), the others those of `carry_out`;
    it raises what these two raise.
    """
    conversion = prepare(source, destination, **options)
    return carry_out(conversion, workers=workers, processes=processes, on_progress=on_progress)


def carry_out(
    conversion: Conversion,
    *,
    workers: int | None = None,
    processes: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Run `conversion` with `workers` threads, or processes; resumes what an earlier run finished.

    ConflictError where replicas or witnesses contradict, CorruptError for damaged or changed sources, StorageError when
    storage fails, InterruptedRunError on Ctrl-C; the destination is then no checkpoint and the next run goes on.
    """
    plan, destination = conversion.plan, conversion.destination
    counter = Counter(sum(task.nbytes for task in plan.tasks), len(plan.tasks))
    with destination.exclusive(), _interruptible(destination):
        state = examine(destination, conversion.wanted, restart=conversion.restart)  # again: now nobody else writes
        if state == "done":
            journals.remove(destination)
            return Report(0, 0, 0, len(plan.tasks), counter.seconds, len(plan.tasks), already_done=True)
        if state == "new":
            clear(destination)
        journal = Journal(destination, conversion.wanted.fingerprint)
        done = _resume(conversion, journal, counter)
        resumed = len(done)
        for finished in _run_rest(
            conversion, done, journal, counter, workers or default_workers(), processes, on_progress
        ):
            done[finished.object] = finished
        extra = _verify_source(conversion, done)
        small = _commit(conversion, done)
        journals.remove(destination)
    return _report(done, counter, resumed=resumed, checked=extra, written=small)


def _resume(conversion: Conversion, journal: Journal, counter: Counter) -> dict[str, Done]:
    """What an earlier run finished, where it is still there."""
    conversion.destination.tidy()
    journalled = journal.open()
    gone = set(lost(conversion.destination, conversion.wanted.sizes)) if journalled else set()
    tasks = [task for task in conversion.plan.tasks if task.object in journalled and task.object not in gone]
    for task in tasks:
        counter.skip(task.nbytes)
    return {task.object: journalled[task.object] for task in tasks}


def _report(done: Mapping[str, Done], counter: Counter, *, resumed: int, checked: int, written: int) -> Report:
    moved = [finished.moved for finished in done.values()]
    return Report(
        bytes_read=sum(m.read for m in moved),
        bytes_checked=sum(m.checked for m in moved) + checked,
        bytes_written=sum(m.written for m in moved) + written,
        objects=len(done),
        seconds=counter.seconds,
        resumed_objects=resumed,
        already_done=False,
    )


def _run_rest(
    conversion: Conversion,
    done: Mapping[str, Done],
    journal: Journal,
    counter: Counter,
    workers: int,
    processes: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Iterator[Done]:
    """Run what is not in `done`, noting each finished object durably at least every second and on the way out."""
    tasks = [task for task in conversion.plan.tasks if task.object not in done]
    flushed = counter.seconds
    running = run_tasks(
        tasks,
        source=conversion.source,
        destination=conversion.destination,
        checksums=conversion.catalog.checksums,
        counter=counter,
        workers=max(1, min(workers, len(tasks))),
        processes=processes,
    )
    try:
        for finished in running:
            if finished is not None:
                journal.add(finished)
                yield finished
            if counter.seconds - flushed > _FLUSH_SECONDS:
                journal.flush()
                flushed = counter.seconds
            if on_progress is not None:
                on_progress(counter.progress())
    finally:
        running.close()
        journal.flush()


def _verify_source(conversion: Conversion, done: Mapping[str, Done]) -> int:
    """Set what was read against the source's digests, and make sure that the source did not change meanwhile."""
    ledger = Ledger(Spans(conversion.catalog.checksums))
    for finished in done.values():
        ledger.add(finished.pieces)
    extra = ledger.verify(conversion.source)
    hint = "wait until it is written, then convert with --restart"
    check_unchanged(conversion.source, conversion.catalog, conversion.catalog.objects, hint=hint)
    return extra


def _commit(conversion: Conversion, done: Mapping[str, Done]) -> int:
    """Put the small objects, the root last; returns their bytes."""
    destination, root = conversion.destination, conversion.target.root
    digests = {name: finished.digests for name, finished in done.items()}
    sizes: dict[str, int] = {}
    for path, data in itertools.chain([(RECORD, _record(conversion))], conversion.target.finish(digests)):
        assert root not in sizes, f"{conversion.to} put {path} after its root"
        if path == root:
            destination.flush(list(sizes))
            check_whole(destination, {**conversion.wanted.sizes, **sizes})
        destination.put(path, data, durable=path == root)
        sizes[path] = len(data)
    assert root in sizes, f"{conversion.to} did not put its root"
    return sum(sizes.values())


def _record(conversion: Conversion) -> bytes:
    about = {"fingerprint": conversion.wanted.fingerprint, "source": conversion.source.url, "to": conversion.to}
    return json.dumps(about, indent=1).encode()


def _fingerprint(catalog: Catalog, plan: Plan, to: str, **options: Any) -> str:
    """Changes whenever the same conversion would read or write something else."""
    parts = {
        "to": to,
        "options": {name: repr(value) for name, value in options.items()},
        "objects": sorted((path, *info) for path, info in catalog.objects.items()),
        "tasks": sorted((task.object, task.size, task.nbytes) for task in plan.tasks),
        "checked": sorted(catalog.witnesses),
        "program": repr(catalog.program),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _interruptible(destination: Store) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"{destination.url}: interrupted; what is written is kept, and is no checkpoint yet",
            hint="run the same command again: it resumes",
        ) from None


__all__ = ["RECORD", "Conversion", "Progress", "Report", "carry_out", "convert", "prepare"]
