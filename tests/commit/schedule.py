"""Real writers and readers as threads that take turns at every operation of an object store, in every order.

The code that runs is that of the project; only the order is chosen here. An actor runs from one operation that other
actors can see to its next one, then the scheduler decides who goes on. Random names are seeded by actor and pools of
threads work in the thread that asks them, so that an order that was found can be run again.
"""

from __future__ import annotations

import itertools
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from unittest import mock

from tests.commit.objects import Bucket, ObjectStore
from ucp.errors import UcpError
from ucp.store import Store
from ucp.testing.faults import Fault, Operation, placed

_PATIENCE_SECONDS = 60
_UNSEEN = frozenset({"create", "write_at", "flush", "exclusive"})
"""Operations that nobody else can see on a store without locks whose writers show all at once."""
_READS = frozenset({"entry", "entries", "children", "read", "read_into", "read_runs", "read_ranges"})

Actor = Callable[[str], object]
"""Does something with the checkpoint at the URL that it is given."""

Order = Sequence[tuple[str, int | None]]
"""Who goes on for how many operations; None: to the end. Whoever is not at its end afterwards goes on by name."""


class Abandoned(BaseException):
    """Raised in the actors of a run that is given up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an actor returned, or the error of ucp's that it raised."""

    value: object = None
    error: UcpError | None = None

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.error is None

    def __str__(self) -> str:
        return f"{self.value}" if self.ok else f"{type(self.error).__name__}: {self.error}"


@dataclass(slots=True)
class Run:
    """One order, carried out: the operations in it, by whom, and what became of the actors."""

    steps: list[tuple[str, Operation]] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name:>12} {operation}" for name, operation in self.steps]
        return "\n".join([*lines, *(f"{name:>12} ended: {outcome}" for name, outcome in self.outcomes.items())])


class _Turns(Fault):
    """Holds its actor before each operation that others can see until the scheduler lets it go on."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.next: Operation | None = None
        self.outcome: Outcome | BaseException | None = None
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self.thread: threading.Thread | None = None

    def before(self, operation: Operation, half: Callable[[], object] | None) -> None:
        if operation.name in _UNSEEN:
            return
        assert threading.current_thread() is self.thread, f"{self.name} asks storage from several threads"
        self.next = operation
        self._there.release()
        self._go.acquire()
        if self._abandoned:
            raise Abandoned

    def start(self, work: Callable[[], object]) -> None:
        """Begin, and wait for the first operation."""
        self.thread = threading.Thread(target=self._run, args=(work,), name=self.name, daemon=True)
        self.thread.start()
        self._wait()

    def step(self) -> Operation:
        """Let it do its next operation and go on to the one after that."""
        done = self.next
        assert done is not None
        self.next = None
        self._go.release()
        self._wait()
        return done

    def give_up(self) -> None:
        """End it where it is."""
        self._abandoned = True
        self._go.release()

    def _wait(self) -> None:
        assert self._there.acquire(timeout=_PATIENCE_SECONDS), f"{self.name} hangs"
        if isinstance(self.outcome, BaseException):
            raise self.outcome

    def _run(self, work: Callable[[], object]) -> None:
        try:
            self.outcome = Outcome(work())
        except UcpError as error:
            self.outcome = Outcome(error=error)
        except Abandoned:
            return
        except BaseException as error:
            self.outcome = error
        self._there.release()


@dataclass(frozen=True, slots=True)
class Scene:
    """Actors by name at one URL, and what must hold: `always` after every operation, `finally_` at the end.

    They begin with `objects` in the bucket.
    """

    actors: Mapping[str, Actor]
    always: Callable[[str], object]
    finally_: Callable[[str, Mapping[str, Outcome]], object]
    objects: Mapping[str, tuple[bytes, str]] = field(default_factory=dict)
    folder: str = "ckpt"


@dataclass(slots=True)
class Stage:
    """Runs a scene in one order after the other. What was found to hold of a state is not looked at again.

    To the actors the store looks as `seen_as` makes it.
    """

    scene: Scene
    seen_as: Callable[[Store], Store] = lambda store: store
    runs: int = 0
    sound: set[frozenset[tuple[str, str]]] = field(default_factory=set)

    def run(self, order: Order) -> Run:
        """Carry out `order`; AssertionError, with the order as a note, where something does not hold."""
        bucket, made = Bucket(), Run()
        bucket.objects.update(self.scene.objects)
        turns = {name: _Turns(name) for name in self.scene.actors}
        here = f"placed://scene/{self.scene.folder}"
        self.runs += 1
        with (
            _deterministic(),
            placed(
                scene=ObjectStore(bucket),
                **{name: self.seen_as(turn.around(ObjectStore(bucket))) for name, turn in turns.items()},
            ),
        ):
            try:
                for name, turn in turns.items():
                    turn.start(_bound(self.scene.actors[name], f"placed://{name}/{self.scene.folder}"))
                for name in _turns(order, turns):
                    made.steps.append((name, turns[name].step()))
                    self._look(bucket, here)
                made.outcomes = {
                    name: turn.outcome for name, turn in turns.items() if isinstance(turn.outcome, Outcome)
                }
                self.scene.finally_(here, made.outcomes)
            except BaseException as error:
                error.add_note(f"order {order}\n{made}")
                raise
            finally:
                for turn in turns.values():
                    turn.give_up()
        return made

    def _look(self, bucket: Bucket, url: str) -> None:
        state = frozenset((key, etag) for key, (_, etag) in bucket.objects.items())
        if state not in self.sound:
            self.scene.always(url)
            self.sound.add(state)


def _bound(actor: Actor, url: str) -> Callable[[], object]:
    return lambda: actor(url)


def _turns(order: Order, turns: Mapping[str, _Turns]) -> Iterator[str]:
    for name, count in [*order, *((name, None) for name in turns)]:
        done = 0
        while turns[name].next is not None and (count is None or done < count):
            yield name
            done += 1


class Inline:
    """A pool of threads that has none: what is submitted is done at once."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Do it; the error that it raises is the future's."""
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def map(self, work: Callable[..., Any], *args: Iterable[Any]) -> Iterator[Any]:
        """Each in turn."""
        return map(work, *args)

    def shutdown(self, **_: object) -> None:
        """There is nothing to shut down."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


_POOLS = (
    "ucp.lifecycle.carry",
    "ucp.lifecycle.stream",
    "ucp.run.executor",
    "ucp.run.verify",
    "ucp.train.save.consolidated",
    "ucp.train.save.shared",
)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Random names depend on the actor alone, and its work is done in one thread."""
    sources: dict[str, random.Random] = {}

    def uuid4() -> uuid.UUID:
        name = threading.current_thread().name
        source = sources.setdefault(name, random.Random(name))
        return uuid.UUID(int=source.getrandbits(128), version=4)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("uuid.uuid4", uuid4))
        for module in _POOLS:
            stack.enter_context(mock.patch(f"{module}.ThreadPoolExecutor", Inline))
        yield


def explore(stage: Stage, *, switches: int, stride: int = 1) -> int:
    """Run every order in which actors are interrupted at most `switches` times; how many there were.

    An actor is interrupted before each of its operations; with `stride`, before every so many only. Of orders in which
    everybody sees the same only one is run.
    """
    before = stage.runs
    names = list(stage.scene.actors)
    for first in names:
        _extend(stage, names, [], first, switches, stride)
    return stage.runs - before


def _extend(
    stage: Stage, names: Sequence[str], order: list[tuple[str, int | None]], actor: str, left: int, stride: int
) -> Run:
    """Orders that begin with `order` and go on with `actor`; the one in which it is not interrupted."""
    run = stage.run([*order, (actor, None)])
    if not left:
        return run
    done = sum(count or 0 for _, count in order)
    own = [operation for _, operation in _block(run, done, {actor})]
    tried: dict[str, tuple[int, Run]] = {}
    for count in range(1, len(own), stride):
        for other in names:
            if other == actor:
                continue
            if other in tried and (left == 1 or len(names) == 2):
                earlier, found = tried[other]
                between = _block(found, done + earlier, set(names) - {actor})
                if _unseen_by(own[earlier:count], [operation for _, operation in between]):
                    continue
            tried[other] = count, _extend(stage, names, [*order, (actor, count)], other, left - 1, stride)
    return run


def _block(run: Run, start: int, names: set[str]) -> list[tuple[str, Operation]]:
    """The steps of `run` from `start` on that are of `names` without a break."""
    return list(itertools.takewhile(lambda step: step[0] in names, run.steps[start:]))


def _unseen_by(own: Iterable[Operation], others: Sequence[Operation]) -> bool:
    """Whether `own` operations only read, and nothing that `others` change: it is all one which of them come first."""
    changed = [operation.path for operation in others if operation.name not in _READS]
    return all(
        operation.name in _READS and not any(path.startswith(operation.path.rstrip("/")) for path in changed)
        for operation in own
    )
