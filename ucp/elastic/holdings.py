"""What a run keeps and where: its tiers, what they hold when it starts, and how it goes on from there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ucp.catalog import Catalog
from ucp.checkpoint import Checkpoint, open_checkpoint
from ucp.elastic import groups
from ucp.elastic.fence import check_not_given_up
from ucp.elastic.meeting import Meeting
from ucp.elastic.nearby import NodesTier
from ucp.elastic.nodes import join
from ucp.elastic.options import Local, Memory
from ucp.elastic.places import lies_as_saved
from ucp.elastic.records import Past, Records, Start
from ucp.elastic.stored import Stored, look
from ucp.elastic.timeline import Beat, Reached, last_start, reached
from ucp.elastic.versions import Shown, Version, versions_of
from ucp.errors import ContentError, CorruptError, NotFoundError, StorageError, UcpError, UsageError
from ucp.layout import Mesh
from ucp.train.load import load
from ucp.train.manager import CheckpointManager, Resumed
from ucp.train.manager.ranks import Ranks
from ucp.train.report import LoadReport
from ucp.train.save.channel import Channel
from ucp.train.team import Team, attempt, portable

_log = logging.getLogger("ucp")
_LONGEST = 20.0
_PROMISE_SECONDS = 60.0
"""Between two promises: so much of what was done is unknown, at worst, if all nodes are lost."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """The version that a run goes on from. `left` are newer ones that were not taken, each with the reason."""

    step: int
    epoch: int
    tier: str
    url: str
    reconfigured: bool
    left: tuple[tuple[Version, str], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    report: LoadReport | None = None


@dataclass(frozen=True, slots=True)
class Stock:
    """What storage has: the identity of the run, this start, what earlier ones told, and versions."""

    run: str
    start: Start
    past: Past
    versions: Sequence[Version]


class Holdings:
    """The tiers of a run, nearest first. Making one is collective over all ranks, spares too.

    The default process group must be that of all ranks; afterwards it may be made anew of fewer. `beats` are what
    the ranks of earlier starts left.
    """

    def __init__(
        self,
        url: str,
        job: str,
        meeting: Meeting,
        manager: CheckpointManager,
        memory: Memory | None,
        local: Local | None,
        *,
        beats: Sequence[Beat] = (),
    ) -> None:
        self._url, self._meeting, self.manager = url, meeting, manager
        self._channel, self.records = Channel(), Records(url)
        self.nodes = _joined(job, min(_LONGEST, meeting.timeout), {"memory": memory, "local": local})
        self.places: list[str] = self._share(lambda: meeting.world.node)
        shown = self._shown()
        known = [beat.epoch for beat in beats]
        known += [epoch for ones in shown.values() for one in ones for epoch in one.epochs]
        told: Stock = self._share(lambda: self._stored(known, beats) if meeting.world.rank == 0 else None)[0]
        self.run, self.start, self._past = told.run, told.start, told.past
        versions = [
            version
            for tier in self.nodes
            for version in versions_of(shown[tier.name], tier=tier.name, url=tier.store.url, run=self.run)
        ]
        versions = sorted([*versions, *told.versions], key=lambda one: one.order, reverse=True)
        self._candidates = [one for one in versions if one.complete]
        self._left = [(one, one.why) for one in versions if not one.complete]
        self._placed = {
            (name, epoch): nodes
            for name, ones in shown.items()
            for one in ones
            if one.of(self.run)
            for epoch, nodes in one.placed.items()
        }
        self.beats = last_start(beat for beat in beats if beat.run in ("", self.run))
        """Those of the last start of this run."""
        self.reached = self._reached(shown, versions)
        """How far the job had come before this start."""
        self._begun = False
        self._promised: float | None = None
        self._ranks: Ranks | None = None
        self._looked: dict[str, Stored | Exception] = {}

    @property
    def epoch(self) -> int:
        """Number of this start, which no folder of another run has, either."""
        return self.start.epoch

    def _shown(self) -> dict[str, list[Shown]]:
        """What the nodes hold, by tier."""
        told = self._share(lambda: [tier.show() for tier in self.nodes])
        return {
            tier.name: [one for one in (ones[number] for ones in told) if one is not None]
            for number, tier in enumerate(self.nodes)
        }

    def _reached(self, shown: Mapping[str, Sequence[Shown]], versions: Sequence[Version]) -> Reached:
        own = [one for ones in shown.values() for one in ones if one.of(self.run)]
        epochs = [epoch for one in own for epoch in one.epochs]
        last = max([self._past.epoch, *(beat.epoch for beat in self.beats), *epochs])
        return reached(
            self.beats,
            [*self._past.steps, *((one.epoch, one.step) for one in versions if one.epoch and not one.foreign)],
            last=last,
            ended=self._past.ended if self._past.epoch == last else None,
        )

    def catalog(self) -> Catalog | None:
        """The catalog of the version to go on from, for the layout to be chosen by."""
        for one in self._candidates:
            found = attempt(partial(self._catalog_of, one))
            if isinstance(found, Catalog):
                return found
        return None

    def _catalog_of(self, version: Version) -> Catalog | None:
        return self._look(version).catalog if version.tier == "storage" else _catalog(version.url)

    def _look(self, version: Version) -> Stored:
        """What really lies in a folder in storage; looked at, and told in the log, once."""
        if version.url not in self._looked:
            found = attempt(partial(look, version.url, version.step))
            if isinstance(found, StorageError):
                raise found
            self._looked[version.url] = found
        known = self._looked[version.url]
        if isinstance(known, Exception):
            raise known
        return known

    def resume(self, state: Any, *, mesh: Mesh, **options: Any) -> Recovered | None:
        """Fill `state` from the newest version that is whole. Collective over active ranks."""
        left = list(self._left)
        for tier in self.nodes:
            tier.store.tend(self.places[: mesh.size])
        for version in self._candidates:
            lazy = self._lies_here(version, state, mesh, options)
            found = self._load(version, state, {**options, **({"exchange": False} if lazy else {})})
            if isinstance(found, LoadReport):
                self._begin(version, mesh)
                recovered = self._told(version, found, left, lazy=lazy)
                self._say(version, left)
                return recovered
            if not isinstance(found, ContentError | NotFoundError):
                raise found  # what does not answer may be whole: an older version would make it a history given up
            left.append((version, str(found)))
            _log.warning("%s cannot be loaded: %s", version, found)
        told = [f"  {one}: {why}" for one, why in left if one.committed and not one.foreign]
        told += self._broken_promise()
        if told:
            raise NotFoundError(
                "\n".join([f"{self._url}: nothing is left to go on from:", *told]),
                hint=f"bring back what is missing; to begin anew, delete {self._url} and start the job again",
            )
        self._begin(None, mesh)
        self._say(None, left)
        return None

    def _say(self, version: Version | None, left: Sequence[tuple[Version, str]]) -> None:
        if self._meeting.world.rank == 0 and (version is not None or left):
            passed = "".join(f"\n  left {one}: {why}" for one, why in left)
            _log.info("%s: %s%s", self._url, "begins anew" if version is None else f"goes on from {version}", passed)

    def save(self, step: int, state: Any, *, mesh: Mesh) -> None:
        """Save what is due in the tiers beside storage. Collective over active ranks."""
        if not self._begun and self._candidates:
            raise UsageError(
                f"{self._url}: there is {self._candidates[0]}, and step {step} is to be saved",
                hint="run.resume(state) goes on from it; another run needs another url",
            )
        self._begin(None, mesh)
        due = [tier for tier in self.nodes if tier.due(step)]
        for tier, against in zip(due, self._against(due), strict=True):
            if against:
                tier.skip(step, against)
                continue
            handle = tier.save(step, state, epoch=self.epoch)
            if self._meeting.world.rank == 0:
                handle.committed.add_done_callback(
                    lambda done: None if done.exception() is not None else self._promise(step, mesh)
                )

    def _against(self, due: Sequence[NodesTier]) -> list[str]:
        """What speaks against a save in each of the tiers that are `due`, "" where nothing does: the same on all ranks.

        It is asked of all of them, since one rank that did not take part would leave the others waiting.
        """
        if not due:
            return []
        if self._ranks is None:
            self._ranks = Ranks()
            groups.bound(self._meeting.timeout)
        told = self._ranks.gather([tier.against() for tier in due])
        return [next(filter(None, of_ranks), "") for of_ranks in zip(*told, strict=True)]

    @property
    def unsaved(self) -> dict[str, int]:
        """By tier, how many saves that were due were left out or have failed since this start."""
        return {tier.name: tier.unsaved for tier in self.nodes}

    def settle(self) -> None:
        """Wait for the saves under way in the tiers beside storage."""
        for tier in self.nodes:
            tier.settle()

    def forget(self) -> None:
        """On rank 0: say in storage no longer that nodes hold anything."""
        if self.nodes:
            self.records.forget(self.epoch)

    def close(self, *, remove: bool) -> None:
        """Give up the tiers beside storage, and `remove` what they hold."""
        for tier in self.nodes:
            tier.close(remove=remove)

    def _load(self, version: Version, state: Any, options: Mapping[str, Any]) -> LoadReport | Exception:
        """What loading a version gave; again, where something did not answer, or damaged copies were removed."""
        if version.tier == "storage":
            found: Any = self._tried(version, lambda: attempt(lambda: self._resume_stored(version, state, options)))
            return found.report if isinstance(found, Resumed) else found
        report: LoadReport | Exception = self._tried(version, lambda: self._loaded(version, state, options))
        if isinstance(report, ContentError):
            _log.warning("%s: damaged copies are looked for: %s", version, report)
            self._scrub(version)
            again = self._loaded(version, state, options)
            # What is missing then was damaged everywhere, and that is what there is to tell.
            report = report if isinstance(again, ContentError | NotFoundError) else again
        if isinstance(report, LoadReport):
            self.manager.went_on(version.step)
        return report

    def _tried(self, version: Version, work: Callable[[], Any]) -> Any:
        """What `work` gives, which is the same on all ranks; if storage did not answer, what it gives once more."""
        found = work()
        if isinstance(found, StorageError):
            _log.warning("%s: what does not answer is asked again: %s", version, found)
            found = work()
        return found

    def _loaded(self, version: Version, state: Any, options: Mapping[str, Any]) -> LoadReport | Exception:
        # Together: who cannot open it has no part in the load, for which the others would wait.
        opened = self._of_all(attempt(lambda: _opened(version)))
        if isinstance(opened, Exception):
            return opened
        found: LoadReport | Exception = self._of_all(attempt(lambda: load(state, opened, **options)))
        return found

    def _resume_stored(self, version: Version, state: Any, options: Mapping[str, Any]) -> Resumed:
        """Let the manager load the checkpoint that rank 0 has found in the folder of the step."""
        family = Team(self._url).round(lambda: None, lambda ranks: [self._look(version).family] * len(ranks))
        found = self.manager.resume(state, step=version.step, **{"family": family, **options})
        assert found is not None, "a step that is asked for is there or an error"
        return found

    def _of_all(self, mine: Any) -> Any:
        """What this rank has, or what failed on any, the same on all ranks, which must go on alike (`_worst`).

        StorageError if a rank is gone: that is no fault of the version's, and the next start finds it as it is.
        """
        from torch import distributed

        told = portable(mine if isinstance(mine, Exception) else None, distributed.get_rank())
        worst = Team(self._url).round(lambda: (told,), lambda found: [(_worst(found),)] * len(found))[0]
        return mine if worst is None else worst

    def _scrub(self, version: Version) -> None:
        from torch import distributed

        tier = next(one for one in self.nodes if one.name == version.tier)
        if tier.store.leads:
            catalog = attempt(lambda: _catalog(version.url))
            if isinstance(catalog, Catalog):
                store = tier.store.child(version.url.removeprefix(f"{tier.store.url}/"))
                attempt(lambda: store.scrub(catalog.checksums))
        distributed.barrier()

    def _told(
        self, version: Version, report: LoadReport, left: Sequence[tuple[Version, str]], *, lazy: bool
    ) -> Recovered:
        where = version.step, version.epoch, version.tier, version.url
        return Recovered(*where, reconfigured=not lazy, left=tuple(left), seconds=report.parts, report=report)

    def _lies_here(self, version: Version, state: Any, mesh: Mesh, options: Mapping[str, Any]) -> bool:
        """Whether each rank finds its own shards on its own node: places are those of the save, and so is each box.

        Only speed depends on it, as whatever is not here is read from where it is; but all ranks must think the same.
        """
        if self._placed.get((version.tier, version.epoch)) != tuple(self.places[: mesh.size]):
            return False  # on all ranks, which know the same
        mine = attempt(lambda: lies_as_saved(state, _catalog(version.url), layout=options.get("layout")))
        return Team(self._url).round(lambda: mine is True, lambda ranks: [all(ranks)] * len(ranks))

    def _begin(self, kept: Version | None, mesh: Mesh) -> None:
        if not self._begun:
            self._begun = True
            for tier in self.nodes:
                tier.begin(self.epoch, self.places[: mesh.size], kept, run=self.run)

    def _promise(self, step: int, mesh: Mesh) -> None:
        """Say in storage that nodes hold versions now, and how far the job is; not with every one of them."""
        now = time.monotonic()
        if self._promised is None or now - self._promised > _PROMISE_SECONDS:
            self._promised = now
            nodes = self.places[: mesh.size]
            # Storage may be slow, and what goes to memory must not wait for it.
            threading.Thread(target=self._put_promise, args=(step, nodes), name="ucp-promise", daemon=True).start()

    def _put_promise(self, step: int, nodes: Sequence[str]) -> None:
        with suppress(UcpError):
            self.records.promise(self.epoch, nodes, step)

    def _broken_promise(self) -> list[str]:
        """What earlier starts said that nodes hold, or had themselves gone on from."""
        if not self._past.nodes:
            epoch, step = max(self._past.steps, key=lambda told: told[1], default=(0, 0))
            gone_on = step and self._past.ended is None
            return [f"  the version of step {step}, from which epoch {epoch} went on"] if gone_on else []
        gone = ", ".join(one if one in self.places else f"{one} (is not here)" for one in self._past.nodes)
        return [f"  versions that nodes held in memory or on their disks, of which none is left: {gone}"]

    def _stored(self, known: Sequence[int], beats: Sequence[Beat]) -> Stock:
        """Begin this start in storage; `known` are numbers that nodes have from other starts, of whatever run."""
        run, past = self.records.identity(), self.records.past()
        check_not_given_up(self._url, self.records, beats)
        start = self.records.begin(max([past.epoch, *known]) + 1, self.places, run=run)
        # Not earlier: another start that is still at work somewhere saves no more once it sees this one.
        return Stock(run, start, past, [Version(one.step, 0, "storage", one.url) for one in self.manager.saved])

    def _share(self, work: Any) -> list[Any]:
        """What `work` gives on each rank, by rank; what it raises on one, all raise."""
        mine = attempt(work)
        size = self._meeting.world.size
        found: list[Any] = self._channel.round(mine, lambda all_of: [list(all_of)] * size, purpose=self._url)
        return found


def _joined(job: str, timeout: float, tiers: Mapping[str, Memory | Local | None]) -> list[NodesTier]:
    return [
        NodesTier(
            name,
            join(tier.root, job, copies=tier.copies, name=name, timeout=timeout),
            every=tier.every,
            waits=tier.busy == "wait",
        )
        for name, tier in tiers.items()
        if tier is not None
    ]


def _opened(version: Version) -> Checkpoint:
    """A version open for reading; CorruptError if another save than the one that was agreed on lies there."""
    found = open_checkpoint(version.url)
    if version.id and found.catalog.source.detail.get("id") != version.id:
        raise CorruptError(f"{version}: another save of that step lies there on some of the nodes")
    return found


def _worst(found: Sequence[tuple[Exception | None]]) -> Exception | None:
    """Of what the ranks raised, the first that is not about the version; then what may be whole; then what is damaged.

    A version whose storage did not answer is not known to be damaged as a whole, and damage may be mended.
    """
    failed = [error for (error,) in found if error is not None]
    others = [error for error in failed if not isinstance(error, ContentError | NotFoundError | StorageError)]
    silent = [error for error in failed if isinstance(error, StorageError)]
    damage = [error for error in failed if isinstance(error, ContentError)]
    return next(iter([*others, *silent, *damage, *failed]), None)


def _catalog(url: str) -> Catalog:
    return open_checkpoint(url).catalog
