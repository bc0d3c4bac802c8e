"""`ucp.elastic.Run`: one start of a job that may be started again with any number of ranks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from torch import distributed

from ucp.elastic import checks, groups
from ucp.elastic.account import Account
from ucp.elastic.batch import Batch, seat
from ucp.elastic.ending import Mortal, leave_with, told
from ucp.elastic.fits import Choice, Needs, choose
from ucp.elastic.holdings import Holdings
from ucp.elastic.lasting import Lasting
from ucp.elastic.life import Life
from ucp.elastic.meeting import Meeting
from ucp.elastic.nodes.folder import folder_of
from ucp.elastic.options import Local, Memory, check_alike, shared_memory, told_of
from ucp.elastic.policy import Policy
from ucp.elastic.report import RunReport
from ucp.elastic.sole import Sole
from ucp.elastic.timeline import Beat, Timeline, failure, left_behind, process_start, prune
from ucp.elastic.world import World, job_name, world_of
from ucp.errors import UsageError
from ucp.layout import Mesh
from ucp.train.manager import CheckpointManager
from ucp.train.save import SaveHandle
from ucp.train.save.engine import abandon_saves
from ucp.train.team import Team

_log = logging.getLogger("ucp")

_PAUSE, _LONGEST_PAUSE = 0.02, 0.25
_MEMORY = Memory()


class Run:
    """A job whose workers may be lost and come back: this start of it.

    >>> with Run(url, layouts=keep(tp=2), every=1000) as run:  # doctest: +SKIP
    ...     if run.active:
    ...         model, optimizer = build(run.device_mesh("cuda"))
    ...         feed.place(*run.seat)
    ...         state = {"model": model, "optimizer": optimizer, "feed": feed}
    ...         run.resume(state)
    ...         for step in run.steps(steps):
    ...             train_step(model, optimizer, feed)
    ...             run.step(step, state)

    It is for torchrun with ``--max-restarts``, which starts all workers anew, with other ranks, when one is lost and
    when nodes come or go (``--nnodes=MIN:MAX``); other launchers that set ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
    ``MASTER_PORT`` do too, and without any it is a job of one process. `layouts` says which layouts the job would like
    (`keep`, `prefer`); the first that fits `batch` and `needs` is taken (`choose`). Ranks that it leaves over are
    *spare*: they have no part in the process group, which is of the active ranks alone, wait where the `with` block
    ends, and leave with the others.

    Checkpoints go to `url` as those of a `CheckpointManager` do, which gets `options`: ``every``, ``keep_latest``,
    ``upload``. `memory` and `local` keep newer ones nearer; None leaves them out. `resume` takes the newest of all that
    is whole, in any layout.

    `timeout`, in seconds, bounds all waiting for ranks that may be gone: no collective of training may take longer, and
    none of them may hold the interpreter's lock so long. `backend` is that of the process group (gloo, and NCCL where
    there are GPUs), which the run makes unless it is there. `job` names the folders on nodes, by default after `url`.

    When the block is left by an exception, saves under way are given up, and unless somebody catches the exception the
    process ends at once, for torchrun to start anew. Under torchrun SIGTERM ends it at once, too; for a signal that
    means to save first give `preempt`. When all have left the block in the ordinary way, what memory and local disks
    hold is removed. So the last step of `steps` is saved to storage, due or not, where `every` is given; the log warns
    if steps are lost all the same, as after a loop that was left early: for these there is `save`.

    UsageError, on all ranks, if no layout fits; StorageError if the others do not come within `timeout`.
    """

    def __init__(
        self,
        url: str,
        *,
        layouts: Policy,
        batch: Batch | None = None,
        needs: Needs | None = None,
        memory: Memory | None = _MEMORY,
        local: Local | None = None,
        timeout: float = 60.0,
        backend: str | None = None,
        job: str | None = None,
        **options: Any,
    ) -> None:
        if timeout <= 0:
            raise UsageError(f"timeout={timeout}: must be more than 0 seconds")
        self.url, self.layouts, self.batch, self.needs = url, layouts, batch, needs
        self.memory, self.local, self.timeout, self.backend = memory, local, timeout, backend
        self.job = job or job_name(url)
        self.done = 0
        """Optimizer steps done."""
        self._world: World = world_of()
        launched = self._world.agent is not None
        self.manager = CheckpointManager(url, **({"preempt": ()} if launched else {}) | options)
        """Of the checkpoints in storage."""
        self._lasting = Lasting(self.manager)
        self._mortal = Mortal()
        self._meeting: Meeting | None = None
        self._life: Life | None = None
        self._sole: Sole | None = None
        self._recovered: Any = None
        self._stepped, self._folder, self._over = False, "", False
        self._until: int | None = None
        self._found: Any = None

    @property
    def rank(self) -> int:
        """Number of this rank among all of the job."""
        return self._world.rank

    @property
    def world(self) -> int:
        """Ranks of the job, spares among them."""
        return self._world.size

    @property
    def local_rank(self) -> int:
        """Number of this rank among those of its launcher on its node, which is that of its GPU."""
        return self._world.local_rank

    @property
    def node(self) -> str:
        """The name of this node: ``UCP_NODE``, or that of the host."""
        return self._world.node

    @property
    def mesh(self) -> Mesh:
        """The layout that was chosen."""
        return self.choice.mesh

    @property
    def spare(self) -> bool:
        """Whether the layout leaves this rank over."""
        return not self.active

    @property
    def seat(self) -> tuple[int, int]:
        """Where this rank is among those that train on different samples, and how many these are (`Feed.place`)."""
        self._check_active()
        return seat(self.mesh, self.rank, None if self.needs is None else self.needs.data)

    @property
    def epoch(self) -> int:
        """Number of this start of the job, from 1; the same on all ranks."""
        return self._holdings.epoch

    @property
    def tiers(self) -> list[Any]:
        """The tiers beside storage, nearest first."""
        return [*self._holdings.nodes]

    @property
    def preempted(self) -> bool:
        """Whether the job is being ended and its state is saved: `steps` stops by itself."""
        return self.manager.preempted

    @property
    def report(self) -> RunReport:
        """What there is to tell of this start; complete after its first step."""
        found = self._recovered
        return RunReport(
            self.epoch,
            self.world,
            self.mesh,
            self.choice.spares,
            step=0 if found is None else found.step,
            tier=None if found is None else getattr(found, "tier", "storage"),
            reconfigured=bool(getattr(found, "reconfigured", False)),
            steps_lost=max(0, self._holdings.reached.step - (0 if found is None else found.step)),
            at_least=not self._holdings.reached.sure,
            unsaved=self._holdings.unsaved,
            done=self.done if self._over else None,
            parts=self._timeline.parts(),
        )

    def device_mesh(self, device: str) -> Any:
        """The torch DeviceMesh of the layout, with its names of axes, for ``"cpu"`` or ``"cuda"``. Collective."""
        self._check_active()
        return groups.device_mesh(self.mesh, device, self.timeout)

    def resume(self, state: Any, **options: Any) -> Any:
        """Fill `state` from the newest version that is whole, wherever it is; None if there never was one. Collective.

        `options` are those of `ucp.load`. Afterwards `done` is the number of optimizer steps done.
        """
        self._check_active()
        self._check_state(state)
        self._timeline.resuming = time.time()
        groups.bound(self.timeout)
        found = self._holdings.resume(state, mesh=self.mesh, **options)
        groups.bound(self.timeout)
        self._timeline.resumed = time.time()
        self._timeline.loading = dict(getattr(found, "seconds", {}))
        self._recovered = found
        self.done = 0 if found is None else int(found.step)
        self._found = state if found is not None and found.tier != "storage" else None
        return found

    def steps(self, until: int) -> Iterator[int]:
        """Numbers of the steps to do, from the one after `done` to `until`; ends early when the job is preempted.

        The last one is saved to storage, due or not, where `every` is given. Where nodes held it, and a failure came
        before it was in storage, that is made up for now.
        """
        state, self._found, self._until = self._found, None, until
        if state is not None and self.done >= until:
            self._lasting.end(self.done, state)
        for step in range(self.done + 1, until + 1):
            yield step
            if self.preempted:
                return

    def step(self, step: int, state: Any, *, metrics: Mapping[str, Any] | None = None) -> None:
        """To be called after each optimizer step, by all active ranks: saves what is due in each tier.

        `metrics` are kept with what goes to storage. UsageError for a step that is done already, and for a state that
        the job cannot go on from (`ucp.elastic.checks.check_state`).
        """
        self._check_active()
        if step <= self.done:
            raise UsageError(
                f"{self.url}: step {step} comes after step {self.done}", hint="for step in run.steps(…): counts on"
            )
        if not self._stepped:
            self._check_state(state, stepped=True)
        self._living.check()
        self.done = step
        self._living.done(step, first=not self._stepped)
        if not self._stepped:
            self._first_step()
        self._holdings.save(step, state, mesh=self.mesh)
        saves = self._lasting.step(step, state, metrics)
        if step == self._until:
            saves |= self._lasting.end(step, state, metrics)
        if saves:
            self._living.saves()

    def save(self, step: int, state: Any, *, metrics: Mapping[str, Any] | None = None) -> SaveHandle:
        """Begin a save of `step` to storage, due or not (`CheckpointManager.save`).

        If `step` is saved already, or being saved, that save is returned; its metrics are those given now, if any.
        """
        self._check_active()
        self._living.saves()
        return self._lasting.save(step, state, metrics)

    def __enter__(self) -> Self:
        self._timeline = Timeline(process_start(), time.time())
        try:
            self._begin()
        except BaseException as error:
            self._give_up(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self._give_up(error)
            return
        try:
            self._finish()
        except BaseException as failed:
            self._give_up(failed)
            raise

    def _begin(self) -> None:
        world = self._world
        if world.agent is not None:
            self._mortal.begin()
        checks.begin()
        self._meeting = Meeting(world, self.timeout)
        self._life = Life(world, self._met.line(), self.timeout)
        asked = {"url": self.url, "job": self.job, "every": self.manager.every, "batch": self.batch}
        check_alike(self._met.gather("asked", told_of({**asked, "memory": self.memory, "local": self.local})))
        groups.begin(self._met)
        beats = self._beats()
        self._timeline.met = time.time()
        self._holdings = Holdings(self.url, self.job, self._met, self.manager, self.memory, self.local, beats=beats)
        self._timeline.failed = failure(self._holdings.beats)
        self.choice: Choice = self._chosen()
        self.active = groups.keep_active(self._met, self.mesh, self.backend)
        if self.active:
            groups.tell_size(self.mesh.size)
        self._life.numbered(self.url, self._holdings, self._folder)
        self._account = Account(self.url, self._holdings)
        self._timeline.agreed = time.time()
        if world.rank == 0:
            _log.info("%s: epoch %d: %s", self.url, self.epoch, self.choice)

    def _chosen(self) -> Choice:
        """The layout, chosen by rank 0 for all."""

        def choice(_: object) -> list[Choice]:
            catalog = self._holdings.catalog()
            found = choose(self.layouts, self.world, batch=self.batch, needs=self.needs, catalog=catalog)
            return [found] * self.world

        return Team("the layout").round(lambda: None, choice)

    def _beats(self) -> list[Beat]:
        """What ranks of earlier starts left on the nodes that are here. Collective."""
        world = self._world
        root = next((tier.root for tier in (self.memory, self.local) if tier is not None), None)
        where = root or shared_memory(), self.job, world.node
        self._folder = os.path.join(folder_of(*where), "beats")
        self._sole = Sole(os.path.dirname(self._folder), self.url)
        self._sole.take(self._met)
        folder_of(*where)  # a start that ended meanwhile took its folders along
        mine = left_behind(self._folder, take=False) if world.local_rank == 0 else []
        told = self._met.gather("beats", [beat.doc for beat in mine])
        return [Beat.of(doc) for docs in told for doc in docs]

    def _first_step(self) -> None:
        """The job is training again: tell what that took."""
        self._stepped = True
        groups.bound(self.timeout)
        self._timeline.stepped = time.time()
        if self.rank == 0:
            report = self.report
            _log.info("%s: %s", self.url, report)
            self._account.begun(report)

    def _check_active(self) -> None:
        if not self.active:
            raise UsageError(
                f"rank {self.rank} is spare: {self.mesh} does without it",
                hint="put what trains under `if run.active:`; spare ranks wait where the `with` block ends",
            )

    def _check_state(self, state: Any, *, stepped: bool = False) -> None:
        ranks = lambda: self.seat[1]  # noqa: E731  asked only where there are engines
        checks.check_state(state, batch=self.batch, mesh=self.mesh, ranks=ranks, stepped=stepped)

    def _finish(self) -> None:
        """Wait for what is under way, and for the others; then tidy up."""
        life = self._living
        if self.active:
            self._holdings.settle()
            self.manager.close()
            life.check(last=True)  # what was being saved is saved
            self._met.say("done")
        self._await("done", range(self.mesh.size))
        # Nobody may look for what memory held once some of it is gone.
        self._over = True
        if self.rank == 0:
            self._lasting.warn_of_loss(self.done, nodes=bool(self._holdings.nodes))
            if self._stepped or self._recovered is not None:
                self._account.ended(self.report)
            self._holdings.forget()
            self._met.say("forgotten")
        self._await("forgotten", range(1))
        life.end()
        self._holdings.close(remove=True)
        life.forget()
        if self._sole is not None:
            self._sole.release()
        self._met.part()
        self._mortal.end()
        self._end_group()

    def _await(self, word: str, ranks: range) -> None:
        """Wait until all of `ranks` have said a word; the watch ends this process if one of them is lost."""
        pause = _PAUSE
        while not self._met.said(word, ranks):
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)

    def _give_up(self, error: BaseException) -> None:
        """Something failed here: wait for nobody any more. Alone, there is nobody who could be gone."""
        world = self._world
        if not world.alone:
            _log.error("rank %d on %s leaves: %s", world.rank, world.node, told(error))
            leave_with(error)
            if self._life is not None:
                self._life.leave(told(error))
            abandon_saves()
        self.manager.__exit__(type(error), error, error.__traceback__)
        if self._life is not None:
            self._life.break_off()
        if world.alone:
            self._end_group()
        if world.alone and self.memory is None and self.local is None and self._folder and not self._left_to_others():
            left_behind(self._folder, take=True)
            prune(self._folder)
        if world.alone and self._sole is not None:
            self._sole.release()
        self._mortal.end()

    def _left_to_others(self) -> bool:
        """Whether it is known on this node that another start goes on: that must not be forgotten."""
        return any(beat.lost_to for beat in left_behind(self._folder, take=False))

    def _end_group(self) -> None:
        groups.tell_size(self._world.size)
        if self._meeting is not None and not self._meeting.grouped and distributed.is_initialized():
            distributed.destroy_process_group()

    @property
    def _met(self) -> Meeting:
        if self._meeting is None:
            raise UsageError(f"the run of {self.url} has not begun", hint="with Run(...) as run: …")
        return self._meeting

    @property
    def _living(self) -> Life:
        if self._life is None:
            raise UsageError(f"the run of {self.url} has not begun", hint="with Run(...) as run: …")
        return self._life
