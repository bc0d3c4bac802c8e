"""One save on one rank, from what the rank has to tell to what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import NotFoundError, StorageError
from ucp.metrics import TIMINGS
from ucp.store import Store, open_store
from ucp.train.declared import DeclaredLayout
from ucp.train.inventory import Memory, take_inventory
from ucp.train.save.channel import Channel
from ucp.train.save.form import Form, Snapshot, Task
from ucp.train.save.ground import Ground, survey
from ucp.train.save.handle import SaveHandle, SaveReport
from ucp.train.save.lead import Lead, check_requests, compare
from ucp.train.save.message import Layout, Order, Told, told_apart
from ucp.train.save.plan import Cut, Plan
from ucp.train.save.snapshot import Live, Staged, digest_of
from ucp.train.save.staging import Buffer, Buffers, stage
from ucp.train.save.whole import Whole
from ucp.train.team import attempt


@dataclass(frozen=True, slots=True)
class Cached:
    """A layout that this rank has told, and its plan for it."""

    layout: Layout
    plan: Plan


@dataclass(slots=True)
class Job:
    """A save under way. `mine` is what this rank brings: an exception where it cannot take part.

    An error is brought as well as anything else, since the others would wait for this rank otherwise. `refused` if
    all ranks know already that there will be no checkpoint.
    """

    form: Form
    handle: SaveHandle
    mine: Told | Exception
    overwrite: bool = False
    cached: Cached | None = None
    store: Store | None = None
    layout: Layout | None = None
    memory: Memory = field(default_factory=Memory)
    snapshot: Snapshot | None = None
    order: Order | None = None
    whole: Whole | None = None
    ground: Ground | None = None
    buffer: Buffer | None = None
    refused: bool = False
    started: float = field(default_factory=time.perf_counter)
    staged_seconds: float = 0.0

    def look(self, state: Any, cached: Cached | None, *, stages: bool, declared: DeclaredLayout | None = None) -> None:
        """See what this rank holds of `state`; `stages` if it copies that by the plan it has before the ranks agree.

        `declared` says how tensors lie that do not tell themselves.
        """
        found = attempt(lambda: self._look(state, cached, stages, declared))
        if isinstance(found, Exception):
            self.mine = found

    def _look(self, state: Any, cached: Cached | None, stages: bool, declared: DeclaredLayout | None) -> None:
        self.store = open_store(self.handle.url)
        self.layout, values = told_apart(take_inventory(state, self.memory, layout=declared), self.memory)
        self.snapshot = Live(self.memory)
        request = (self.handle.url, self.handle.step, self.form.name, self.overwrite)
        if cached is not None and cached.layout == self.layout:
            version = cached.plan.version
            self.cached, self.mine = cached, Told(request, values, version, version if stages else 0)
        else:
            self.mine = Told(request, values, 0, 0, self.layout)

    @property
    def on_device(self) -> bool:
        """Whether copies are queued on a device, behind what the caller's thread has queued there."""
        return self.layout is not None and bool(self.layout.on_device)

    def begin_staging(self, buffers: Buffers) -> None:
        """Start to copy what this rank is to write: by its plan, or all it holds if the others may not know its layout.

        What lies in host memory is copied when this returns.
        """
        found = attempt(lambda: self._stage(buffers))
        if isinstance(found, Exception):
            self.mine = found

    def end_staging(self) -> None:
        """Wait until all is copied: from then on the state may change."""
        if isinstance(self.snapshot, Staged) and isinstance(found := attempt(self.snapshot.staging.wait), Exception):
            self.mine = found
        self.memory = Memory()
        self.staged_seconds = time.perf_counter() - self.started
        TIMINGS.add("save_staged", self.staged_seconds)
        self.handle.staged.set_result(None)

    def stage(self, buffers: Buffers) -> None:
        """Copy all of it."""
        self.begin_staging(buffers)
        self.end_staging()

    def _stage(self, buffers: Buffers) -> None:
        assert self.layout is not None
        cuts: Sequence[Cut] = [Cut(piece, piece) for piece in self.layout.pieces]
        check: Sequence[Cut] = ()
        if self.cached is not None:
            cuts, check = self.cached.plan.write, self.cached.plan.check
        self.snapshot = staged = Staged(buffers, self.buffer or buffers.take())
        staged.staging = stage(staged.buffer, self.memory, cuts, check)

    def close(self) -> None:
        """Let go of what was staged."""
        if self.snapshot is not None:
            self.snapshot.close()

    def agree(self, channel: Channel, lead: Lead) -> Cached:
        """All ranks tell what they bring, and hear what they are to do; raises on all if one of them cannot."""
        told = self.mine

        def answer(all_told: Sequence[Told]) -> Sequence[Order]:
            assert self.store is not None
            check_requests(all_told)
            ground = survey(self.store, self.form.root, self.form.is_ours, overwrite=self.overwrite)
            self.whole, orders = lead.order(all_told)
            self.ground, tag = ground, orders[0].tag
            briefs = self.form.brief(self.whole, [order.plan for order in orders], self.store, ground, tag)
            return [Order(tag, one.plan, brief, ground.root) for one, brief in zip(orders, briefs, strict=True)]

        self.order = channel.round(told, answer, purpose=self.handle.url)
        assert self.layout is not None
        assert self.order is not None
        self.cached = Cached(self.layout, self.order.plan)
        return self.cached

    def write(self, channel: Channel) -> SaveReport:
        """Write this rank's part; rank 0 makes a checkpoint of it all. What was written is removed if that fails."""
        assert self.store is not None
        assert self.order is not None
        assert self.snapshot is not None
        order, ground = self.order, self.ground
        task = Task(
            self.store, channel, self.snapshot, order.plan, order.tag, order.brief, before=order.before, ground=ground
        )

        def answer(found: Sequence[tuple[Any, Mapping[Any, Any]]]) -> Sequence[SaveReport]:
            assert self.whole is not None
            compare([digests for _, digests in found])
            nbytes = self.form.commit(self.whole, task, [written for written, _ in found])
            return [self._report(nbytes, len(self.whole.tensors), channel.size)] * channel.size

        failed = self.mine if isinstance(self.mine, Exception) else None
        if self.form.talks:
            # Nobody may begin to talk to a rank that will not answer.
            channel.round(failed, lambda found: [None for _ in found], purpose=self.handle.url)
        mine = failed or attempt(lambda: (self.form.write(task), _digests(task)))
        try:
            report: SaveReport = channel.round(_told(mine), answer, purpose=self.handle.url)
        except Exception:
            # A rank that lost the line does not know whether there is a checkpoint now, which needs what it wrote.
            if task.rank == 0 or not channel.broken:
                self.form.discard(task)
            raise
        TIMINGS.add("save_committed", time.perf_counter() - self.started)
        return report

    def _report(self, nbytes: int, tensors: int, ranks: int) -> SaveReport:
        seconds = time.perf_counter() - self.started
        handle = self.handle
        return SaveReport(handle.url, handle.step, self.form.name, tensors, ranks, nbytes, seconds, self.staged_seconds)


def _digests(task: Task) -> dict[Any, Any]:
    """Digests of all that several ranks hold and this one can tell of."""
    found = dict(task.digests)
    for cut in task.plan.write:
        if cut.compare and cut.piece not in found:
            digest = task.snapshot.compared(cut)
            found[cut.piece] = digest_of(task.snapshot.tensor(cut), cut) if digest is None else digest
    for cut in task.plan.check:
        if (digest := task.snapshot.compared(cut)) is not None:
            found[cut.piece] = digest
    return found


def _told(found: Any) -> Any:
    """Something gone while a save was writing it is a failure of storage, not a thing that was asked for and is not."""
    if isinstance(found, NotFoundError):
        return StorageError(f"{found.message}: removed while it was written", hint="save again")
    return found
