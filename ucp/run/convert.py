"""Conversion: read a checkpoint of one family, write it as another; interrupted anywhere, it resumes.

A conversion is a plan and a journal. Nothing in the destination counts as a checkpoint until its root object is put,
which happens last, after every byte read was set against the source's own digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ucp.catalog import Catalog
from ucp.converter import Target, converter, read_catalog
from ucp.errors import CorruptError, InterruptedRunError, UsageError
from ucp.plan import Plan
from ucp.run import journal as journals
from ucp.run.executor import default_workers, run_tasks
from ucp.run.integrity import Ledger, Spans
from ucp.run.journal import Done, Journal
from ucp.run.progress import Counter, Progress, Report
from ucp.store import Store, open_store

RECORD = "ucp-conversion.json"
"""Object beside the root that says which source state the checkpoint was made from."""

_FLUSH_SECONDS = 1.0

State = Literal["new", "partial", "done"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that is ready to run; nothing has been written.

    `state` is ``new``, ``partial`` (an earlier run was cut short and will be resumed) or ``done``.
    """

    catalog: Catalog
    target: Target
    plan: Plan
    to: str
    source: Store
    destination: Store
    fingerprint: str
    state: State

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
    read_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Conversion:
    """Read the source's metadata and plan its conversion to family `to`, without writing anything.

    `check` compares replicas and low-precision copies with the tensors; `restart` throws away what an earlier,
    different run left unfinished. `read_options` go to the source's converter, `options` to the target's. Raises what
    reading raises; UsageError if the destination is the source or holds something else.
    """
    catalog, source_store = read_catalog(source, family=family, **(read_options or {}))
    destination_store = open_store(destination)
    _refuse_same(source_store, destination_store)
    if not check:
        catalog = catalog.unchecked()
    target = converter(to).target(catalog, source_store, **options)
    plan = Plan.of(target.tasks)
    fingerprint = _fingerprint(catalog, plan, to)
    state = _state(destination_store, target, fingerprint, restart=restart)
    return Conversion(catalog, target, plan, to, source_store, destination_store, fingerprint, state)


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

    `options` are those of `prepare` (``to``, ``family``, ``check``, …), the others those of `carry_out`; it raises what
    these two raise.
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
    if conversion.state == "done":
        journals.remove(destination)
        return Report(0, 0, 0, len(plan.tasks), counter.seconds, len(plan.tasks), already_done=True)
    with destination.exclusive(), _interruptible(destination):
        journal = Journal(destination, conversion.fingerprint)
        done = _still_there(journal.open(), conversion)
        resumed = len(done)
        for task in plan.tasks:
            if task.object in done:
                counter.skip(task.nbytes)
        for finished in _run_rest(
            conversion, done, journal, counter, workers or default_workers(), processes, on_progress
        ):
            done[finished.object] = finished
        extra = _verify_source(conversion, done)
        small = _commit(conversion, done)
        journal.remove()
    rest = plan.cost.bytes_read - counter.resumed_bytes
    written = plan.cost.bytes_written + small
    return Report(rest, plan.cost.bytes_checked + extra, written, len(plan.tasks), counter.seconds, resumed, False)


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
    for path, (_, fingerprint) in conversion.catalog.objects.items():
        if conversion.source.entry(path).fingerprint != fingerprint:
            raise CorruptError(
                f"{conversion.source.url}/{path}: changed while it was being read",
                hint="wait until it is written, then convert with --restart",
            )
    return extra


def _commit(conversion: Conversion, done: Mapping[str, Done]) -> int:
    """Put the small objects, the root last; returns their bytes."""
    destination = conversion.destination
    record = {"fingerprint": conversion.fingerprint, "source": conversion.source.url, "to": conversion.to}
    destination.put(RECORD, json.dumps(record, indent=1).encode(), durable=False)
    digests = {name: finished.digests for name, finished in done.items()}
    root, put, written = conversion.target.root, [RECORD], 0
    for path, data in conversion.target.finish(digests):
        assert put[-1] != root, f"{conversion.to} put {path} after its root"
        if path == root:
            destination.flush(put)
        destination.put(path, data, durable=path == root)
        put.append(path)
        written += len(data)
    assert put[-1] == root, f"{conversion.to} did not put its root"
    return written


def _still_there(done: dict[str, Done], conversion: Conversion) -> dict[str, Done]:
    """Of the journalled objects, those that the plan wants and that have their size."""
    kept = {}
    for task in conversion.plan.tasks:
        if task.object in done and _size(conversion.destination, task.object) == task.size:
            kept[task.object] = done[task.object]
    return kept


def _size(store: Store, path: str) -> int:
    return store.entry(path).size if store.exists(path) else -1


def _fingerprint(catalog: Catalog, plan: Plan, to: str) -> str:
    """Changes whenever the same conversion would read or write something else."""
    parts = {
        "to": to,
        "objects": sorted((path, *info) for path, info in catalog.objects.items()),
        "tasks": sorted((task.object, task.size, task.nbytes) for task in plan.tasks),
        "checked": sorted(catalog.witnesses),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _state(destination: Store, target: Target, fingerprint: str, *, restart: bool) -> State:
    """Whether the destination is empty, resumable or complete; UsageError if it holds anything else."""
    if destination.exists(target.root):
        record = json.loads(destination.read(RECORD)) if destination.exists(RECORD) else {}
        if record.get("fingerprint") == fingerprint:
            return "done"
        raise UsageError(f"{destination.url}: already holds another checkpoint", hint="choose another destination")
    earlier = journals.Journal.plan_of(destination)
    if earlier == fingerprint:
        return "partial"
    if earlier is None and set(destination.children()) <= {journals.FOLDER}:  # empty, or the journal's first put failed
        return "new"
    if earlier is None:
        raise UsageError(f"{destination.url}: not empty, and no conversion of ours", hint="choose another destination")
    if not restart:
        raise UsageError(
            f"{destination.url}: holds an unfinished conversion of another source, or of one that has changed",
            hint="--restart throws it away and starts again",
        )
    _clear(destination)
    return "new"


def _clear(destination: Store) -> None:
    """Delete an unfinished conversion; the journal's head goes last, so that this too can be resumed."""
    for entry in list(destination.entries()):
        if not entry.path.startswith(journals.FOLDER):
            destination.delete(entry.path)
    journals.remove(destination)


def _refuse_same(source: Store, destination: Store) -> None:
    a, b = source.url.rstrip("/") + "/", destination.url.rstrip("/") + "/"
    if a.startswith(b) or b.startswith(a):
        raise UsageError(
            f"source {source.url} and destination {destination.url} overlap",
            hint="write the result to a folder of its own: sources are never modified",
        )


@contextlib.contextmanager
def _interruptible(destination: Store) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"{destination.url}: interrupted, not complete", hint="run the same command again: it resumes"
        ) from None


__all__ = ["Conversion", "Progress", "Report", "carry_out", "convert", "prepare"]
