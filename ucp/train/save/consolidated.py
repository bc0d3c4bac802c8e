"""Consolidated forms: whole tensors, as a conversion would write them, straight from the memory of the ranks.

A checkpoint in the memory of the ranks is one like any other: a catalog says which rank has which box of which tensor,
and a family's own target says which objects are made of them. Each rank writes the objects that it is assigned, and
reads from the others what it has not.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch

from ucp.catalog import Catalog, ParamGroup, Source
from ucp.converter import Target
from ucp.errors import ConflictError, NotFoundError, StorageError, UcpError
from ucp.format.manifest import FAMILY
from ucp.format.records import ROOT, is_ours
from ucp.format.target import UniversalTarget
from ucp.layout import itemsize
from ucp.plan import Digests, Extent, Fragment, Key, Plan
from ucp.plan import Task as ObjectTask
from ucp.run.claim import FOLDER, claim, claim_of, withdraw
from ucp.run.integrity import Ledger, Spans
from ucp.run.laying_out import make_target
from ucp.run.worker import write_object
from ucp.store import Store
from ucp.train.peers import Address, Memory, MemoryServer, PeersStore, object_of
from ucp.train.save.digest import as_bytes
from ucp.train.save.form import Form, Task
from ucp.train.save.ground import Ground, check_whole, unchanged
from ucp.train.save.plan import Plan as RankPlan
from ucp.train.save.whole import Whole
from ucp.train.team import attempt

_LOG = logging.getLogger("ucp")
_LEFT = "%s: what an earlier save has left could not be removed: %s"
_WORKERS = 4
_PURPOSE = "writing whole tensors"

Written = dict[str, tuple[Digests, int]]
"""Digests and size of each object that a rank wrote."""


@dataclass(frozen=True, slots=True)
class Brief:
    """What a rank is told: the objects it writes, bytes of memory that each rank offers, and the root object."""

    tasks: tuple[ObjectTask, ...]
    sizes: Mapping[str, int]
    root: str


class ConsolidatedForm(Form):
    """One save in the form of the checkpoint `family`; `options` go to its target. Make a new one for every save."""

    talks = True

    def __init__(self, family: str = "universal", *, lossy: bool = False, **options: Any) -> None:
        self.name, self.lossy, self.options = family, lossy, options
        self.root = ROOT if family == FAMILY else None
        self._target: Target | None = None

    def is_ours(self, path: str) -> bool:
        """Whether it lies where objects of a universal checkpoint do."""
        return self.root is not None and is_ours(path)

    def brief(self, whole: Whole, plans: Sequence[RankPlan], store: Store, ground: Ground, tag: str) -> Sequence[Brief]:
        """The objects of each rank. FitError where the family cannot hold the tensors."""
        sizes = {object_of(rank): sum(cut.piece.nbytes for cut in plan.write) for rank, plan in enumerate(plans)}
        catalog = _catalog(whole, plans)
        here = PeersStore(b"", {}, sizes)
        target = make_target(self.name, catalog, here, lossy=self.lossy, **self.options)
        if isinstance(target, UniversalTarget) and not _claimed(store, ground, tag):
            target = cast("Target", target.relocated(tag))
        self._target = target
        assigned = _assign(Plan.of(target.tasks).tasks, len(plans))
        return [Brief(tuple(tasks), sizes, target.root) for tasks in assigned]

    @property
    def notes(self) -> tuple[str, ...]:
        """On rank 0, what the family has no place for, and accepted losses."""
        if self._target is None:
            return ()
        return tuple(self._target.notes)

    def write(self, task: Task) -> Written:
        """The objects of this rank, durable; StorageError where a rank is gone or writing fails."""
        key = task.tag.encode().ljust(16, b"\0")[:16]
        offer = attempt(lambda: _offer(task, key))
        # Whatever goes wrong on one rank is heard by all, in this round or the next: nobody waits for who has left.
        mine = offer if isinstance(offer, Exception) else offer[1]
        try:
            addresses = task.channel.round(mine, _for_all, purpose=_PURPOSE)
            held, _ = offer
            peers = PeersStore(
                key,
                {object_of(rank): address for rank, address in enumerate(addresses)},
                task.brief.sizes,
                {object_of(task.rank): held},
            )
            written = attempt(lambda: _write(peers, task))
            peers.close()
            # Nobody stops to offer its memory before everybody has read what it needs.
            told = written if isinstance(written, Exception) else None
            task.channel.round(told, _for_all, purpose=_PURPOSE)
        finally:
            _server(os.getpid()).withdraw(key)
        done: Written = written
        return done

    def commit(self, whole: Whole, task: Task, written: Sequence[Written]) -> int:
        """Small objects, and the root last: from then on there is a checkpoint."""
        target, store = self._target, task.store
        assert target is not None, "the rank that commits has briefed the others"
        found = {path: told for one in written for path, told in one.items()}
        sizes = {path: size for path, (_, size) in found.items()}
        check_whole(store, sizes, root=target.root, before=task.before)
        total = sum(sizes.values())
        small: list[str] = []
        for path, data in target.finish({path: digests for path, (digests, _) in found.items()}):
            if path == target.root:
                store.flush(small)
            last = path == target.root
            store.put(
                path, data, durable=last, if_absent=last and not task.before, if_match=task.before if last else None
            )
            small.append(path)
            total += len(data)
        if task.ground is not None:
            task.ground.clear(store, partial(_LOG.warning, _LEFT, store.url))
        _withdraw(task)
        return total

    def discard(self, task: Task) -> None:
        """Remove what this rank has written, unless another save has made a checkpoint of it."""
        with suppress(UcpError):
            if task.brief is None or not unchanged(task.store, task.brief.root, task.before):
                return
            for one in task.brief.tasks:
                task.store.delete(one.object)
            _withdraw(task)


def _claimed(store: Store, ground: Ground, tag: str) -> bool:
    """Whether the plain names are this save's: nobody else can be writing under them."""
    if not ground.empty:
        return False
    try:
        claim(store, _purpose(tag))
    except ConflictError:
        return False
    # Another one may have come and gone between the look at the folder and the claim.
    return set(store.children()) <= {FOLDER}


def _purpose(tag: str) -> str:
    return f"save {tag}"


def _withdraw(task: Task) -> None:
    """Give up the claim, if it is this save's."""
    held = claim_of(task.store) if task.rank == 0 else None
    if held is not None and held.fingerprint == _purpose(task.tag):
        withdraw(task.store)


def _catalog(whole: Whole, plans: Sequence[RankPlan]) -> Catalog:
    """The checkpoint in the ranks' memory; what each of them writes lies there in the order of its plan."""
    fragments: dict[Key, list[Fragment]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        at = 0
        for cut in plan.write:
            piece = cut.piece
            extent = Extent.contiguous(object_of(rank), at, piece.box.shape, piece.dtype)
            fragments[piece.key].append(Fragment(piece.box, extent))
            at += piece.nbytes
    return Catalog(
        url="this job",
        source=Source("torch", torch.__version__, whole.mesh),
        tensors=whole.tensors,
        fragments={
            Key(tensor.name, state): tuple(fragments[Key(tensor.name, state)])
            for tensor in whole.tensors.values()
            for state in tensor.states
        },
        step=whole.step,
        ties=whole.ties,
        param_groups=tuple(ParamGroup(tuple(names), options) for names, options in whole.groups),
        state=whole.state,
    )


def _assign(tasks: Sequence[ObjectTask], world: int) -> list[list[ObjectTask]]:
    """The objects of each rank, largest first: bytes to write and bytes to fetch from others count alike."""
    assigned: list[list[ObjectTask]] = [[] for _ in range(world)]
    loads = [0] * world
    for task in tasks:
        own = _own(task)
        costs = [load + task.size + task.nbytes - own.get(object_of(rank), 0) for rank, load in enumerate(loads)]
        rank = min(range(world), key=costs.__getitem__)
        assigned[rank].append(task)
        loads[rank] = costs[rank]
    return assigned


def _own(task: ObjectTask) -> Mapping[str, int]:
    """About how many of its bytes each rank has itself."""
    found: dict[str, int] = defaultdict(int)
    for section in task.sections:
        spec = section.cover.spec
        share = section.region.length / max(1, spec.size)
        for fragment in section.cover.fragments:
            found[fragment.extent.object] += int(fragment.extent.size * itemsize(spec.dtype) * share)
    return found


def _offer(task: Task, key: bytes) -> tuple[Memory, Address]:
    """What this rank writes, for the others to read, and where they find it."""
    held, server = Memory([as_bytes(task.snapshot.tensor(cut)) for cut in task.plan.write]), _server(os.getpid())
    server.offer(key, held)
    return held, server.address


def _for_all(found: Sequence[Any]) -> list[list[Any]]:
    """What all ranks brought, for each of them."""
    return [list(found) for _ in found]


def _write(peers: PeersStore, task: Task) -> Written:
    tasks: Sequence[ObjectTask] = task.brief.tasks
    workers = max(1, min(_WORKERS, len(tasks), len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(workers, thread_name_prefix="ucp-save") as pool:
        futures = [pool.submit(_write_one, peers, task, one) for one in tasks]
        try:
            done = {one.object: future.result() for one, future in zip(tasks, futures, strict=True)}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    try:
        task.store.flush(list(done))
    except NotFoundError as error:
        raise StorageError(f"{error.message}: removed while it was written", hint="save again") from error
    return done


def _write_one(peers: PeersStore, task: Task, one: ObjectTask) -> tuple[Digests, int]:
    digests, _ = write_object(peers, task.store, one, ledger=Ledger(Spans(())), advance=lambda _: None)
    return digests, one.size


@cache
def _server(_: int) -> MemoryServer:
    """One per process, given by its number, for all saves."""
    return MemoryServer()
