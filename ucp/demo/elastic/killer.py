"""Blows to a cluster whose job trains, at random moments or at a phase, and what has to come of them in time."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ucp.demo.elastic import phases
from ucp.demo.elastic.cluster import Cluster
from ucp.demo.elastic.ledger import Strike
from ucp.demo.elastic.phases import Orders
from ucp.demo.elastic.progress import Progress

STRIKES = "strikes.jsonl"
_RESTARTING = (phases.START, phases.RECOVERY, phases.READING)
"""Phases that come only after another blow."""
_KINDS = {"rank": 60, "node": 20, "agent": 10, "cut": 10}
_MOMENT = 1.5
_REACHED = 60.0
_INTO = 0.02
_AHEAD = 3
"""Steps that a job may do until all of its ranks have heard that they are to wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """What to do to a rank's process, its agent, its node, or the link of its node, and when.

    With a `phase`, `delay` seconds after the rank has reached it; else `delay` seconds from now.
    """

    what: str
    phase: str | None = None
    delay: float = 0.0


def blows(rng: random.Random, *, divided: bool, among: Sequence[str] = phases.PHASES) -> Iterator[Blow]:
    """Random blows without end: each of the phases `among` comes as often as any, and some at a moment of no phase."""
    kinds = {what: weight for what, weight in _KINDS.items() if divided or what != "cut"}
    while True:
        for phase in rng.sample([*among, None, None, None], len(among) + 3):
            (what,) = rng.choices(list(kinds), weights=list(kinds.values()))
            delay = rng.uniform(0, _MOMENT) if phase is None else rng.choice([0.0, rng.uniform(0, _INTO)])
            yield Blow(what=what, phase=phase, delay=delay)


class Killer:
    """Strikes `cluster`, whose job is at `progress`, and sees to it that what is wanted of it runs again.

    `patience` is how many seconds it may take until all ranks have done a step after a blow. What is done is written
    to ``strikes.jsonl`` in the folder of the cluster before it is done.
    """

    def __init__(
        self,
        cluster: Cluster,
        progress: Progress,
        *,
        rng: random.Random,
        patience: float = 120.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._cluster, self._progress, self._rng = cluster, progress, rng
        self._patience, self._say = patience, say
        self._orders = Orders(cluster.folder)
        self._file = cluster.folder / STRIKES
        self.wanted: tuple[str, ...] = ()
        self.strikes: list[Strike] = []
        self._since = 0.0

    @property
    def kills(self) -> int:
        """How many ranks, agents and nodes were killed."""
        return sum(strike.what in ("rank", "agent", "node") for strike in self.strikes)

    def move(self, nodes: Sequence[str]) -> None:
        """From now on the cluster is `nodes`: others are lost, new ones come. UcpError if it does not train in time.

        Where there are only new ones, the job waits for them: it might come to its end before they are there.
        """
        gone = [name for name in self._cluster.present if name not in nodes]
        self._progress.look()
        if self._progress.step and not gone:
            self._orders.hold(epoch=self._progress.epoch, step=self._progress.step + _AHEAD)
        self.wanted = tuple(nodes)
        for name in gone:
            self._do(Blow(what="node"), name, None, None)
        for name in nodes:
            if name not in self._cluster.present:
                self._start(name)
        self.settle()

    def strike(self, blow: Blow) -> None:
        """One blow, and those that have to come before it; `settle` waits until the job has recovered."""
        node, local = self._victim()
        if blow.what == "cut" and len(self._there()) < 2:
            blow = replace(blow, what="rank")
        if blow.phase is None:
            time.sleep(blow.delay)
            self._do(blow, node, local, None)
            return
        self._orders.give(node, local, blow.phase, delay=blow.delay)
        if blow.phase in _RESTARTING:
            self._interrupt()
        pid = self._reached(node, local)
        self._orders.withdraw(node, local)
        self._do(blow, node, local, blow.phase if pid else None)
        if pid is not None and blow.what in ("agent", "cut"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def settle(self) -> float:
        """Wait until all ranks of all wanted nodes that can be reached have done a step since the last blow.

        Nodes that were killed are started anew, and links that were cut are mended once the others go on without.
        Returns the seconds it took. UcpError, with what the agents said last, if it takes longer than the patience.
        """
        begun = time.monotonic()
        away = self._cluster.cut_off
        if away:
            self._works([name for name in self.wanted if name not in away])
        for name in away:
            self._note("heal", name)
            self._cluster.heal(name)
            self._since = time.time()
        self._works(self.wanted)
        self._orders.release()
        return time.monotonic() - begun

    def reach(self, step: int) -> None:
        """Wait until the job has done `step`, or is at its end. UcpError if no new step is done within the patience."""
        while self._progress.step < step and not self._progress.over():
            self._goes_on()

    def finish(self) -> None:
        """Wait until the job has come to its end. UcpError if neither that nor a new step comes within the patience."""
        while not self._progress.over():
            self._goes_on()

    def _goes_on(self) -> None:
        before = self._progress.step

        def further() -> bool:
            self._revive()
            return self._progress.over() or self._progress.step > before

        self._cluster.wait(further, seconds=self._patience, what=f"a step after {before}, or the end of the job")

    def _works(self, nodes: Sequence[str]) -> None:
        def works() -> bool:
            self._revive()
            return self._progress.works(self._cluster.ranks_of(nodes), self._since) or self._progress.over()

        self._cluster.wait(works, seconds=self._patience, what=f"a step of {len(nodes)} nodes")

    def _revive(self) -> None:
        """Start anew what is wanted and gone."""
        for name in self.wanted:
            gone = name not in self._cluster.present and name not in self._cluster.cut_off
            if gone and not self._progress.over():
                self._start(name)

    def _start(self, name: str) -> None:
        self._note("start", name)
        self._cluster.start(name)
        self._since = time.time()

    def _interrupt(self) -> None:
        """Kill some rank that runs, so that the job has to start anew."""
        limit = time.monotonic() + _REACHED
        while not self._progress.over() and time.monotonic() < limit:
            node, local = self._victim()
            if local in self._cluster.ranks(node):
                self._do(Blow(what="rank"), node, local, None)
                return
            self._revive()
            time.sleep(0.05)

    def _there(self) -> list[str]:
        return [name for name in self.wanted if name in self._cluster.reachable]

    def _victim(self) -> tuple[str, int]:
        """A node and one of its ranks, which may just not run."""
        node = self._rng.choice(self._there() or self.wanted)
        return node, self._rng.choice(sorted(self._cluster.ranks(node)) or [0])

    def _reached(self, node: str, local: int) -> int | None:
        """The process that has stopped itself; None if that does not happen, as when the job ends before."""
        limit = time.monotonic() + min(_REACHED, self._patience)
        while time.monotonic() < limit and not self._progress.over():
            pid = self._orders.reached(node, local)
            if pid is not None:
                return pid
            self._revive()
            time.sleep(0.01)
        return None

    def _do(self, blow: Blow, node: str, local: int | None, phase: str | None) -> None:
        self._note(blow.what, node, local if blow.what == "rank" else None, phase)
        if blow.what == "rank":
            self._cluster.kill_rank(node, local or 0)
        elif blow.what == "agent":
            self._cluster.kill_agent(node)
        elif blow.what == "node":
            self._cluster.kill_node(node)
        else:
            self._cluster.cut(node)
        # Nodes that meet before the others are back would do all the steps that are left without them.
        self._orders.hold(step=self._progress.step + _AHEAD, but=self._cluster.ranks_of(self.wanted))
        self._since = time.time()

    def _note(self, what: str, node: str, local: int | None = None, phase: str | None = None) -> None:
        self._progress.look()
        strike = Strike(time=time.time(), what=what, node=node, rank=local, phase=phase, step=self._progress.step)
        self.strikes.append(strike)
        with open(self._file, "a") as file:
            file.write(json.dumps(asdict(strike)) + "\n")
        self._say(f"step {strike.step}: {strike.words}")


def read_strikes(folder: Path) -> list[Strike]:
    """What was done to the job in `folder`."""
    path = folder / STRIKES
    return [Strike(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
