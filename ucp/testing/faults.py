"""Stores that fail on purpose: every operation is counted, and at a chosen one the process dies or an error is raised.

>>> def work(fault):
...     with placed(there=fault.around(LocalStore(folder))):
...         ucp.convert(source, "placed://there")
>>> for crash in crashes(work, how="before"):  # doctest: +SKIP
...     check(folder), print(crash.at)  # at every operation of `work` in turn; put `folder` back before the next

Operations are all methods of stores and of their writers that reach storage, those of child stores too.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import select
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal, NoReturn, TypeVar

from ucp.errors import StorageError, UsageError
from ucp.store import OPENERS, Buffer, Entry, LocalStore, Store, Writer
from ucp.testing.watched import Around

T = TypeVar("T")
How = Literal["before", "after", "torn"]
"""When a process dies: before an operation, after it, or with half of what it writes on its way."""

_PATIENCE_SECONDS = 120.0
_SCHEME = "placed"
_PLACES: dict[str, Store] = {}


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a method of a store or a writer; they are numbered from 1."""

    number: int
    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.number}: {self.name} {self.path}".rstrip()


class Fault:
    """What becomes of the operations of all stores `around` which it is put. This one only notes them."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._numbers = itertools.count(1)

    def around(self, store: Store) -> Store:
        """`store`, with this fault."""
        return _Faulty(store, self)

    def run(self, name: str, path: str, perform: Callable[[], T], half: Callable[[], object] | None = None) -> T:
        """Carry out one operation; `half` does half of it, and is missing where there are no halves."""
        operation = Operation(next(self._numbers), name, path)
        self.operations.append(operation)
        self.before(operation, half)
        found = perform()
        self.after(operation)
        return found

    def before(self, operation: Operation, half: Callable[[], object] | None) -> None:
        """Called before each operation."""

    def after(self, operation: Operation) -> None:
        """Called after each operation that succeeded."""


class Death(Fault):
    """The process kills itself with SIGKILL at operation `at`; before it too where there are no halves to be ``torn``.

    The last word goes to the file descriptor `told`, if any.
    """

    def __init__(self, at: int, how: How = "before", told: int | None = None) -> None:
        super().__init__()
        self.at, self.how, self.told = at, how, told

    def before(self, operation: Operation, half: Callable[[], object] | None) -> None:
        if operation.number != self.at or self.how == "after":
            return
        if self.how == "torn" and half is not None:
            half()
        self._die(operation)

    def after(self, operation: Operation) -> None:
        if operation.number == self.at and self.how == "after":
            self._die(operation)

    def _die(self, operation: Operation) -> NoReturn:
        self._say({"died": asdict(operation)})
        _kill()

    def _say(self, word: object) -> None:
        if self.told is not None:
            with open(self.told, "wb", closefd=False) as file:
                file.write(json.dumps(word).encode())


class Failure(Fault):
    """StorageError at operation `at`, once or, with `lasting`, at all from then on.

    With `lost` the operation is carried out all the same: its answer is lost.
    """

    def __init__(self, at: int, *, lasting: bool = False, lost: bool = False) -> None:
        super().__init__()
        self.at, self.lasting, self.lost = at, lasting, lost

    def before(self, operation: Operation, half: Callable[[], object] | None) -> None:
        if not self.lost:
            self._fail(operation)

    def after(self, operation: Operation) -> None:
        if self.lost:
            self._fail(operation)

    def _fail(self, operation: Operation) -> None:
        if operation.number == self.at or (self.lasting and operation.number > self.at):
            raise StorageError(f"{operation.path}: {operation.name} fails on purpose (operation {operation.number})")


def Dying(inner: Store, *, at: int, how: How = "before") -> Store:  # noqa: N802 - makes a store
    """`inner`, in which the process dies at operation `at`."""
    return Death(at, how).around(inner)


def Failing(inner: Store, *, at: int, lasting: bool = False) -> Store:  # noqa: N802 - makes a store
    """`inner`, in which operation `at` raises StorageError, and with `lasting` all after it."""
    return Failure(at, lasting=lasting).around(inner)


@contextmanager
def placed(**stores: Store) -> Iterator[None]:
    """Inside, ``placed://<name>`` is the URL of the store given by that name, in this process and its forks."""
    before = dict(_PLACES)
    _PLACES.update(stores)
    OPENERS[_SCHEME] = _open_placed
    try:
        yield
    finally:
        _PLACES.clear()
        _PLACES.update(before)


@dataclass(frozen=True, slots=True)
class Crash:
    """What became of a forked process: `at` is the operation at which it died; `error` what it raised instead.

    Where it did not die, `operations` are all that it did.
    """

    at: Operation | None
    how: How
    operations: tuple[Operation, ...] = ()
    error: str = ""

    def __str__(self) -> str:
        return f"killed {self.how} {self.at}" if self.at else self.error or "ran to its end"


def crash(work: Callable[[Fault], object], *, at: int = 0, how: How = "before") -> Crash:
    """Fork a process that does `work` with a fault that kills it at operation `at`; 0 is never reached."""
    out, into = os.pipe()
    with warnings.catch_warnings():
        # Other threads of this process hold no lock that the child needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run(work, Death(at, how, into))
    os.close(into)
    try:
        said = json.loads(_heard(out, child) or "{}")
    finally:
        os.close(out)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert "died" in said, f"killed by signal {os.WTERMSIG(status)}, not by its own hand"
        return Crash(Operation(**said["died"]), how)
    return Crash(None, how, tuple(Operation(*one) for one in said["operations"]), said["error"])


def crashes(work: Callable[[Fault], object], *, how: How = "before", start: int = 1, step: int = 1) -> Iterator[Crash]:
    """`crash` for `start` and every `step`-th operation after it, as long as `work` gets that far.

    Each is yielded before the next begins. AssertionError if `work` raises before its process dies.
    """
    for at in itertools.count(start, step):
        one = crash(work, at=at, how=how)
        assert not one.error, f"before operation {at}: {one.error}"
        if one.at is not None:
            yield one
        else:
            return


def _run(work: Callable[[Fault], object], fault: Death) -> NoReturn:
    error = ""
    try:
        work(fault)
    except BaseException:  # noqa: BLE001 - told to the parent
        error = traceback.format_exc()
    try:
        fault._say({"operations": [astuple(one) for one in fault.operations], "error": error[-30_000:]})
    finally:
        os._exit(0)


def _heard(out: int, child: int) -> str:
    found = b""
    while select.select([out], [], [], _PATIENCE_SECONDS)[0]:
        data = os.read(out, 1 << 16)
        found += data
        if not data:
            return found.decode()
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the forked process hangs")


def _kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives this")


def _open_placed(url: str, **_: Any) -> Store:
    name, _sign, path = url.removeprefix(f"{_SCHEME}://").rstrip("/").partition("/")
    if name not in _PLACES:
        raise UsageError(f"{url}: nothing is placed there")
    return _PLACES[name].child(path) if path else _PLACES[name]


class _Faulty(Around):
    """Tells `fault` of each operation; paths are those in the store that the fault was put around."""

    def __init__(self, inner: Store, fault: Fault, folder: str = "") -> None:
        super().__init__(inner)
        self._fault, self._folder = fault, folder

    def entry(self, path: str) -> Entry:
        return self._run("entry", path, lambda: self.inner.entry(path))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        return iter(self._run("entries", prefix, lambda: list(self.inner.entries(prefix))))

    def children(self, path: str = "") -> list[str]:
        return self._run("children", path, lambda: self.inner.children(path))

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._run("read", path, lambda: self.inner.read(path, offset, length))

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self._run("read_into", path, lambda: self.inner.read_into(path, offset, buffer))

    def read_runs(self, path: str, offsets: Sequence[int], length: int, buffer: memoryview) -> None:
        self._run("read_runs", path, lambda: self.inner.read_runs(path, offsets, length, buffer))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        self._run("read_ranges", path, lambda: self.inner.read_ranges(path, ranges))

    def create(self, path: str, size: int) -> Writer:
        return _FaultyWriter(self, path, self._run("create", path, lambda: self.inner.create(path, size)))

    def replace(self, path: str, size: int) -> Writer:
        return _FaultyWriter(self, path, self._run("replace", path, lambda: self.inner.replace(path, size)))

    def put(
        self, path: str, data: Buffer, *, if_absent: bool = False, if_match: str | None = None, durable: bool = True
    ) -> None:
        def put() -> None:
            self.inner.put(path, data, if_absent=if_absent, if_match=if_match, durable=durable)

        self._run("put", path, put, (lambda: _never_renamed(put)) if _is_local(self.inner) else None)

    def delete(self, path: str) -> None:
        self._run("delete", path, lambda: self.inner.delete(path))

    def flush(self, paths: Sequence[str]) -> None:
        self._run("flush", " ".join(paths), lambda: self.inner.flush(paths))

    def tidy(self) -> None:
        self._run("tidy", "", self.inner.tidy)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        inner = self.inner.exclusive()
        self._run("exclusive", "", inner.__enter__)
        try:
            yield
        finally:
            inner.__exit__(None, None, None)

    def child(self, path: str) -> Store:
        return _Faulty(self.inner.child(path), self._fault, self._path(path) + "/" if path else self._folder)

    def sibling(self, name: str) -> Store:
        above = self._folder.rstrip("/").rpartition("/")[0]
        return _Faulty(self.inner.sibling(name), self._fault, f"{above}/{name}/" if above else f"{name}/")

    def overlaps(self, other: Store) -> bool:
        return self.inner.overlaps(other.inner if isinstance(other, _Faulty) else other)

    def _path(self, path: str) -> str:
        return f"{self._folder}{path}"

    def _run(self, name: str, path: str, perform: Callable[[], T], half: Callable[[], object] | None = None) -> T:
        return self._fault.run(name, self._path(path), perform, half)


class _FaultyWriter(Writer):
    def __init__(self, store: _Faulty, path: str, inner: Writer) -> None:
        self._store, self._at, self.inner = store, path, inner

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self._store._run(
            "write_at",
            self._at,
            lambda: self.inner.write_at(offset, data),
            lambda: self.inner.write_at(offset, view[: len(view) // 2]),
        )

    def close(self) -> None:
        self._store._run("close", self._at, self.inner.close)

    def abort(self) -> None:
        self.inner.abort()


def _is_local(store: Store) -> bool:
    while isinstance(store, Around):
        store = store.inner
    return isinstance(store, LocalStore)


class _CutShort(Exception):
    pass


def _never_renamed(put: Callable[[], None]) -> None:
    """What a put leaves that is cut short just before the object gets its name; the process must end after this."""
    local: Any = importlib.import_module("ucp.store.local_write")

    def cut_short(*_: object) -> NoReturn:
        raise _CutShort

    local.os.link = local.os.replace = local.os.unlink = cut_short
    with suppress(_CutShort):
        put()


__all__ = ["Crash", "Death", "Dying", "Failing", "Failure", "Fault", "Operation", "crash", "crashes", "placed"]
