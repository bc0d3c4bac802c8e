"""What newer checkpoints have made superfluous is removed: marked first, deleted after a time of grace, root first."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ucp.pipeline.leases import Lease, take
from ucp.pipeline.pointer import Pointer
from ucp.pipeline.records import Record, Records, is_there
from ucp.store import Store


@dataclass(frozen=True, slots=True)
class Pruning:
    """Where to prune. What was marked `grace` seconds ago is deleted; `tell` gets ``retired`` or ``pruned``, and what.

    Nobody makes a checkpoint that another watcher is deleting: both need its lease, of `lease` seconds.
    """

    store: Store
    records: Records
    pointer: Pointer
    grace: float
    lease: float
    tell: Callable[[str, str], None]


def prune(pruning: Pruning, record: Record) -> None:
    """Mark a checkpoint if it is not yet, and delete it if its time has come.

    What the pointer names stays: it is read after the mark, and who sets it looks for marks after that.
    """
    retired = record if record.state == "retired" else _retire(pruning, record)
    if retired is None:
        return
    published, _ = pruning.pointer.read()
    if published is not None and published.name == record.name:
        pruning.records.change(record.as_state("verified"), was=retired)
    elif time.time() - retired.since >= pruning.grace:
        sweep(pruning, retired)


def sweep(pruning: Pruning, record: Record) -> None:
    """Delete a checkpoint that is to be removed, is damaged, or is no longer whole, and forget it."""
    lease = take(pruning.store, record.name, pruning.lease)
    if lease is None:
        return
    try:
        now = pruning.records.one(record.name)
        whole = is_there(pruning.store, record.about, record.name)
        if now != record or (record.state == "verified" and whole):
            return
        remove(pruning.store, record.name, str(record.about.get("root")), lease)
        pruning.records.remove(record.name)
        pruning.tell("pruned", record.name)
    finally:
        lease.release()


def remove(store: Store, name: str, root: str, lease: Lease) -> None:
    """Delete a checkpoint, the object that makes it one first; what is left of an earlier attempt as well."""
    store.delete(f"{name}/{root}")
    if store.children(name):
        store.flush([name])
    for entry in list(store.entries(f"{name}/")):
        store.delete(entry.path)
        lease.renew()


def _retire(pruning: Pruning, record: Record) -> Record | None:
    """The record with the mark; None where there is nothing to mark, or another watcher has changed it."""
    if record.state == "damaged":
        return record
    retired = record.as_state("retired", time.time())
    if not pruning.records.change(retired, was=record):
        return None
    pruning.tell("retired", record.name)
    return retired
