"""A whole job that is struck on a course of changing clusters, and its account."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ucp.demo.elastic import records
from ucp.demo.elastic.cluster import Cluster, Meeting
from ucp.demo.elastic.killer import Killer, blows, read_strikes
from ucp.demo.elastic.ledger import Account, account
from ucp.demo.elastic.phases import PHASES
from ucp.demo.elastic.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """`nodes` are all there may be, with their ranks; `course` the sets of them that are there, one after the other.

    There are `kills` kills at least, all over the course, at random moments and at `phases` that `seed` tells,
    unless the job is at step `until` before. A part of the course begins when the job has done its share of the steps
    until then. The first blow comes after step `first`, each other one after `apart` new steps or more: there is
    something to lose. In the part `again` of all cases the next one comes while the job recovers from the one before.
    Every recovery, and every new step, may take `patience` seconds. After `limit` seconds there are no more blows.
    """

    nodes: Mapping[str, int]
    course: Sequence[Sequence[str]]
    kills: int
    until: int
    seed: int
    divided: bool = False
    phases: Sequence[str] = PHASES
    first: int = 4
    apart: int = 4
    again: float = 0.25
    limit: float = math.inf
    patience: float = 120.0
    meeting: Meeting = field(default_factory=Meeting)

    def run(self, folder: Path, command: Sequence[str], *, say: Callable[[str], None] = lambda _: None) -> None:
        """Run the job `command` in `folder` to its end. UcpError if it does not go on in time, or does not end."""
        rng, progress = random.Random(self.seed), Progress(folder)
        begun = time.monotonic()
        with Cluster(folder, command, nodes=self.nodes, divided=self.divided, meeting=self.meeting) as cluster:
            killer = Killer(cluster, progress, rng=rng, patience=self.patience, say=say)
            coming = blows(rng, divided=self.divided, among=self.phases)
            for stage, nodes in enumerate(self.course, 1):
                killer.reach(self._begins(stage) if killer.wanted else 0)
                killer.move(nodes)
                killer.reach(self._begins(stage))
                part = stage / len(self.course)
                while (
                    killer.kills < self.kills * part
                    and progress.step < self.until
                    and time.monotonic() - begun < self.limit * part
                ):
                    killer.strike(next(coming))
                    if rng.random() >= self.again:
                        say(f"{killer.kills} kills, {progress.world} ranks again after {killer.settle():.1f} s")
                        killer.reach(progress.step + self.apart)
                killer.settle()
            killer.finish()

    def missed(self, account: Account, *, tier: str | None = None) -> tuple[str, ...]:
        """What of the course, in words, did not come about; of `tier` there is to be a recovery."""
        wanted = {sum(self.nodes[name] for name in nodes) for nodes in self.course}
        lacking = sorted(wanted - set(account.worlds))
        checks = {
            f"{account.kills} kills of {self.kills}": account.kills < self.kills,
            f"no step on {', '.join(map(str, lacking))} ranks": lacking,
            f"no recovery from {tier}": tier and tier not in {recovery.tier for recovery in account.recoveries},
        }
        return tuple(told for told, wrong in checks.items() if wrong)

    def _begins(self, stage: int) -> int:
        """The step that is done before this part of the course, counted from 1, and its blows."""
        return self.first + (self.until - self.first) * (stage - 1) // len(self.course)


def undisturbed(folder: Path, command: Sequence[str], *, ranks: int = 1, seconds: float = 600.0) -> None:
    """Run the same job on one node that nobody touches."""
    with Cluster(folder, command, nodes={"alone": ranks}) as cluster:
        progress = Progress(folder)
        cluster.start("alone")
        cluster.wait(progress.over, seconds=seconds, what="the end of the undisturbed job")


def account_of(folder: Path, reference: Path) -> Account:
    """The account of the job in `folder`, against the undisturbed one in `reference`."""
    return account(records.read(folder), records.read(reference), read_strikes(folder))
