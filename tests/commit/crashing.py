"""One way to write a checkpoint, disturbed at each of its operations in turn, and what must hold afterwards.

A process is killed, or storage fails. After it exactly the old or the new checkpoint opens, whole. What is run again
then ends with the very bytes that a run has that nobody disturbed, and with nothing else.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

from tests.commit.places import Place, State
from tests.commit.truth import opens
from ucp.errors import UcpError
from ucp.store import open_store
from ucp.testing.faults import Failure, Fault, How, Operation, crash, placed

Kind = Literal["before", "after", "torn", "error", "lost"]
"""A process killed before, after or in the middle of an operation; an operation that fails, or whose answer is lost."""

KINDS: tuple[Kind, ...] = ("before", "after", "torn", "error", "lost")
TEARABLE = ("write_at", "put")
CHANGES = ("create", "replace", "write_at", "close", "put", "delete")
"""Operations that leave something else than was there before."""

TRIES = 3
"""How often a run is made that ends before it comes to an operation that others came to."""

_PLACE = "placed://there"
_URL = f"{_PLACE}/ckpt"


@dataclass(frozen=True, slots=True)
class Story:
    """`work` writes a checkpoint of step `new` to the URL that it is given, where `before` has been at work.

    That left one of step `old`, if any. `look` says which step opens. Where `litter` lies about, a run that begins
    anew takes other names; what it ends with then is as good. What is `forgotten` stays where a run ended right after
    its commit, when there is nothing left to do again. Steps `between` may open on the way. `plain` takes from what is
    left what is another each time. Where `work` done again may have nothing left to do, `again` goes on to step `last`.
    """

    name: str
    work: Callable[[str], object]
    new: int
    old: int | None = None
    before: Callable[[str], object] = lambda url: None
    look: Callable[[str], int | None] = opens
    litter: Mapping[str, bytes] = field(default_factory=dict)
    forgotten: tuple[str, ...] = ()
    between: tuple[int | None, ...] = ()
    plain: Callable[[State], State] = lambda state: state
    again: Callable[[str], object] | None = None
    last: int | None = None


@dataclass(slots=True)
class Tally:
    """How often a run was disturbed, by kind, and how many different states of the storage that left.

    `short` are those that ended, whole, before the operation came: threads and clocks make some runs shorter.
    """

    story: str
    place: str
    points: Counter[str] = field(default_factory=Counter)
    states: int = 0
    short: int = 0
    broken: int = 0
    """Remains in which something that must hold does not."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.points.items())
        return f"{self.story} on {self.place}: {self.points.total()} points ({kinds}), {self.states} states"


def named(seed: str) -> Any:
    """Inside, random names are those of `seed`: two runs that take the same names can be compared byte for byte."""
    source = random.Random(seed)

    def uuid4() -> uuid.UUID:
        return uuid.UUID(int=source.getrandbits(128), version=4)

    return mock.patch("uuid.uuid4", uuid4)


def exhaust(
    story: Story, place: Place, kinds: Iterable[Kind] = KINDS, *, only: Sequence[str] = (), count: bool = False
) -> Tally:
    """Disturb `story` at every operation, or at those whose name is in `only`.

    AssertionError where what must hold afterwards does not, unless that is to be a `count` in the tally, or too many
    runs ended before they could be disturbed.
    """
    place.put_back({})

    def begin() -> None:
        with placed(there=place.store), named("earlier"):
            story.before(_URL)
            assert story.look(_URL) == story.old

    place.inside(begin)
    trial = _Trial(story, place, place.state(), Tally(story.name, place.name), count=count)
    operations = trial.undisturbed()
    for kind in kinds:
        for operation in operations:
            if (kind != "torn" or operation.name in TEARABLE) and (not only or operation.name in only):
                trial.disturb(operation.number, kind)
    assert trial.tally.short <= trial.tally.points.total() // 10, f"{trial.tally.short} ended before: {trial.tally}"
    return trial.tally


def cut_short(work: Callable[[str], object], *, at: int) -> Callable[[str], None]:
    """What `work` leaves that is killed at operation `at`."""

    def before(url: str) -> None:
        store = open_store(_PLACE)

        def killed(fault: Fault) -> None:
            with placed(there=fault.around(store)):
                work(url)

        died = crash(killed, at=at)
        assert died.at is not None, f"it ended before: {died}"

    return before


@dataclass(slots=True)
class _Trial:
    story: Story
    place: Place
    start: State
    tally: Tally
    count: bool = False
    ends: list[State] = field(default_factory=list)
    known: set[frozenset[tuple[str, bytes]]] = field(default_factory=set)

    def undisturbed(self) -> tuple[Operation, ...]:
        """What a run does that nobody disturbs, and what it leaves: by its own names, or those of one before."""
        for names, start in (
            ("again", {**self.start, **self.story.litter}),
            ("again", self.start),
            ("first", self.start),
        ):
            self.place.put_back(start)
            run = crash(self._work(names))
            assert not run.error, run.error
            self.place.inside(self._end)
            self.ends.append(_objects(self.story.plain(self.place.state())))
        return run.operations

    def disturb(self, at: int, kind: Kind) -> None:
        """Disturb a run, look what is left, and run it again."""
        for _ in range(TRIES):
            self.place.put_back(self.start)
            reached, what = self._fail(at, lost=kind == "lost") if kind in ("error", "lost") else self._kill(at, kind)
            if reached:
                break
        else:
            self.tally.short += 1
        self.tally.points[kind] += 1
        left = frozenset(self.place.state().items())
        if left in self.known:
            return
        self.known.add(left)
        self.tally.states = len(self.known)
        try:
            self._check()
        except (AssertionError, UcpError) as error:
            self.tally.broken += 1
            if not self.count:
                where = f"{self.story.name} on {self.place.name}, {what}"
                error.add_note(f"{where}; left {sorted(name for name, _ in left)}")
                raise

    def _kill(self, at: int, how: How) -> tuple[bool, str]:
        """Whether the run came as far as operation `at`, and what became of it."""
        died = crash(self._work("first"), at=at, how=how)
        assert not died.error, died.error
        return died.at is not None, f"{died} ({at})"

    def _fail(self, at: int, *, lost: bool) -> tuple[bool, str]:
        """The same of a run whose storage fails."""
        fault = Failure(at, lost=lost)

        def work(told: Fault) -> None:
            logging.disable()
            try:
                self._work("first")(fault)
            except UcpError:
                if len(fault.operations) < at:
                    raise
            told.operations.extend(fault.operations)

        # In a process of its own: threads that are left end with it.
        ended = crash(work)
        assert not ended.error, ended.error
        return len(ended.operations) >= at, f"failed, {lost=}, at operation {at}"

    def _check(self) -> None:
        found = self.place.inside(self._look_and_go_on)
        end = _objects(self.story.plain(self.place.state()))
        if found == self.story.new:
            end = {path: data for path, data in end.items() if path not in self.story.forgotten}
        assert end in self.ends, _difference(end, self.ends)

    def _end(self) -> None:
        with placed(there=self.place.store):
            assert self.story.look(_URL) == self.story.new
            if self.story.again is not None:
                self._go_on()

    def _look_and_go_on(self) -> int | None:
        with placed(there=self.place.store):
            found = self.story.look(_URL)
            assert found in (self.story.old, self.story.new, *self.story.between), f"step {found} opens"
            self._go_on()
        return found

    def _go_on(self) -> None:
        with named("again"):
            (self.story.again or self.story.work)(_URL)
        assert self.story.look(_URL) == (self.story.last or self.story.new)

    def _work(self, names: str) -> Callable[[Fault], object]:
        def work(fault: Fault) -> None:
            with placed(there=fault.around(self.place.store)), named(names):
                self.story.work(_URL)

        return work


def _objects(state: State) -> State:
    """Without empty folders: whether a process that was killed had made one is up to its threads."""
    return {path: data for path, data in state.items() if not path.endswith("/")}


def _difference(end: State, ends: Iterable[State]) -> str:
    told = []
    for expected in ends:
        other = sorted(name for name in expected.keys() & end.keys() if expected[name] != end[name])
        more, less = sorted(end.keys() - expected), sorted(expected.keys() - end)
        told.append(f"{more=} {less=} {other=}")
    return "what a second run leaves: " + "; or ".join(told)
