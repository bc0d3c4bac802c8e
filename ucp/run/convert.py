"""Conversion: read a checkpoint of one family, write it as another; interrupted anywhere, it resumes.

A conversion is a plan and a journal. Nothing in the destination counts as a checkpoint until its root object is put,
which happens last, after every byte read was set against the source's own digests.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ucp.converter import Target, converter
from ucp.errors import ConflictError, InterruptedRunError, UsageError
from ucp.layout import Mesh
from ucp.mapping import AUTO, ProgramLike, read_source
from ucp.metrics import TIMINGS
from ucp.plan import Plan
from ucp.run.claim import Claim, claim, new_generation, resumed, withdraw
from ucp.run.commit import commit
from ucp.run.conversion import Conversion
from ucp.run.destination import (
    RECORD,
    Found,
    Wanted,
    clear,
    examine,
    lost,
    refuse_overlap,
    superseded,
)
from ucp.run.executor import default_workers, run_tasks
from ucp.run.identity import identity
from ucp.run.integrity import Ledger, Spans
from ucp.run.journal import Done, Journal
from ucp.run.laying_out import layout_of, make_target
from ucp.run.progress import Counter, Progress, Report
from ucp.run.sharing import SHARED_BYTES, sharing
from ucp.run.unchanged import check_unchanged
from ucp.store import Store, open_store

_FLUSH_SECONDS = 1.0


def prepare(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str = "universal",
    family: str | None = None,
    check: bool = True,
    restart: bool = False,
    overwrite: bool = False,
    share: bool = False,
    program: ProgramLike | None = None,
    sizes: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    to_program: ProgramLike | None = None,
    to_sizes: Mapping[str, int] | None = None,
    to_flags: Mapping[str, bool] | None = None,
    lossy: bool = False,
    read_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Conversion:
    """Read the source's metadata and plan its conversion to family `to`, without writing anything.

    A conversion `program` puts the source's tensors together and names them, as in `ucp.open`; `sizes` and `flags` are
    the program's. The result is laid out for the ranks of `mesh` as `to_program` says, with `to_sizes` and `to_flags`;
    where the family has programs of its own, it chooses. A family that writes by logical names, or a `to_program`,
    reads the source through the program that the source itself tells, unless one is given.

    `check` compares replicas and low-precision copies with the tensors; `restart` throws away what an earlier,
    different run left unfinished; `overwrite` replaces a checkpoint of the same family that is there, which stays whole
    until the new one is. With `share`, objects that other checkpoints beside the destination have with the same content
    are not written again: they lie in ``shared``, the pool of the run. `read_options` go to the source's converter,
    `options` to the target's.

    Raises what reading raises; UsageError if the destination is the source or holds something else, or if the family
    cannot be laid out; FitError, unless `lossy` is set, for what the result would not hold exactly.
    """
    source, destination = os.fspath(source), os.fspath(destination)
    layout = layout_of(mesh=mesh, program=to_program, sizes=to_sizes, flags=to_flags)
    if program is None and (getattr(converter(to), "logical", False) or layout.program is not None):
        program = AUTO
    if share and not getattr(converter(to), "shares", False):
        raise UsageError(f"{to} checkpoints share nothing", hint="--share is for --to universal")
    catalog, source_store = read_source(
        source, family=family, program=program, sizes=sizes, flags=flags, **(read_options or {})
    )
    destination_store = open_store(destination)
    refuse_overlap(source_store, destination_store)
    if not check:
        catalog = catalog.unchecked()
    if layout:
        options["layout"] = layout
    if share:
        options.setdefault("shard_bytes", SHARED_BYTES)
    target = make_target(to, catalog, source_store, lossy=lossy, **options)
    plan = Plan.of(target.tasks)
    fingerprint = identity(catalog, plan, to, check=check, read_options=dict(read_options or {}), options=options)
    if share:
        destination_store, target, fingerprint = sharing(destination_store, target, fingerprint)
    if overwrite and not hasattr(target, "relocated"):
        raise UsageError(f"a {to} checkpoint cannot replace another one", hint="choose another destination")
    wanted = Wanted(target, fingerprint, overwrite, restart)
    state = examine(destination_store, wanted).state
    return Conversion(catalog, target, plan, to, source_store, destination_store, wanted, state)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
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


@TIMINGS.measured("convert")
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
    tasks, destination = conversion.plan.tasks, conversion.destination
    counter = Counter(sum(task.nbytes for task in tasks), len(tasks))
    with destination.exclusive(), _interruptible(destination):
        found = examine(destination, conversion.wanted)  # again: where the store locks, nobody else writes now
        if found.state == "done":
            return _already(conversion, found, counter)
        held = _claimed(conversion, found)
        if not held.generation and destination.exists(conversion.wanted.root):
            return _too_late(conversion, counter)
        conversion = conversion.placed(held.generation)
        old = superseded(destination, held, _owned(conversion.target))
        journal = Journal(destination, held)
        done = _resume(conversion, journal, counter)
        resumed = len(done)
        threads = workers or default_workers(conversion.source, conversion.destination)
        for finished in _run_rest(conversion, done, journal, counter, threads, processes, on_progress):
            done[finished.object] = finished
        extra = _verify_source(conversion, done)
        small, ours = commit(conversion, done, found.root, held.generation)
        _remove(destination, old if ours else ())
    return _report(done, counter, resumed=resumed, checked=extra, written=small)


def _claimed(conversion: Conversion, found: Found) -> Claim:
    """The claim of this run on the destination, which is cleared first where nobody can be writing there any more."""
    destination, fingerprint = conversion.destination, conversion.wanted.fingerprint
    if found.state == "partial" and found.claim is not None:
        return resumed(destination, found.claim)
    if found.root is None and (destination.locks or not hasattr(conversion.target, "relocated")):
        clear(destination)
        return claim(destination, fingerprint)
    return claim(destination, fingerprint, generation="" if found.empty else new_generation(), over=found.claim)


def _owned(target: Target) -> Callable[[str], bool]:
    owned: Callable[[str], bool] = getattr(target, "is_ours", lambda _: False)
    return owned


def _too_late(conversion: Conversion, counter: Counter) -> Report:
    """Another writer has made a checkpoint, and given up its claim, between the look at the folder and the claim."""
    withdraw(conversion.destination)
    return _already(conversion, examine(conversion.destination, conversion.wanted), counter)


def _already(conversion: Conversion, found: Found, counter: Counter) -> Report:
    """There is nothing to do but to tidy up; ConflictError if there is."""
    destination, objects = conversion.destination, len(conversion.plan.tasks)
    if found.state != "done":
        raise ConflictError(f"{destination.url}: another writer was first", hint="look at what is there now")
    _finish(conversion, found)
    return Report(0, 0, 0, objects, counter.seconds, objects, already_done=True)


def _finish(conversion: Conversion, found: Found) -> None:
    """Remove what a run of the same conversion left that ended between its commit and its end.

    A claim of another generation is that of somebody who may still be at work.
    """
    claimed = (found.claim.fingerprint, found.claim.generation) if found.claim else None
    if found.claim is not None and claimed == (conversion.wanted.fingerprint, found.generation):
        _remove(conversion.destination, superseded(conversion.destination, found.claim, _owned(conversion.target)))


def _remove(destination: Store, old: Iterable[str]) -> None:
    for path in old:
        destination.delete(path)
    withdraw(destination)


def _resume(conversion: Conversion, journal: Journal, counter: Counter) -> dict[str, Done]:
    """What an earlier run finished, where it is still there."""
    conversion.destination.tidy()
    journalled = journal.open()
    gone = set(lost(conversion.destination, conversion.sizes)) if journalled else set()
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
