"""What no input may make a reader do: run or import anything, touch files or the network, work or grow without bound.

Work is counted in lines of Python, not in seconds, so that the verdict is the same on every machine.
"""

from __future__ import annotations

import codecs
import difflib
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tests.fuzz.memory import ViolationError
from ucp.errors import UcpError
from ucp.lang import shipped

_FORBIDDEN = (
    "code.__new__",
    "compile",
    "ctypes",
    "exec",
    "ftplib",
    "http",
    "import",
    "marshal",
    "open",
    "os.",
    "pickle",
    "pty",
    "shutil",
    "smtplib",
    "socket",
    "sqlite3",
    "subprocess",
    "sys.addaudithook",
    "tempfile",
    "urllib",
    "webbrowser",
)

# The standard library's own modules that our code imports when it first needs them.
_CODECS = "ascii latin-1 raw-unicode-escape utf-8-sig utf-16 utf-16-le utf-16-be utf-32 utf-32-le utf-32-be"
_LOADED = (difflib, [codecs.lookup(name) for name in _CODECS.split()])

_LOOKS = ("open", "os.listdir", "os.scandir")
_PROGRAMS = os.path.dirname(os.path.realpath(str(next(iter(shipped().values())))))


@dataclass(frozen=True, slots=True)
class Allowance:
    """What reading may cost: so much, and so much more per byte of input."""

    lines: int = 2_000_000
    lines_per_byte: int = 1_000
    memory: int = 16 << 20
    memory_per_byte: int = 300


@dataclass(frozen=True, slots=True)
class Cost:
    """What reading did cost; None where it was not counted. `error` is the refusal, if it was one."""

    error: UcpError | None
    lines: int | None = None
    memory: int | None = None


class _Hook:
    """The audit hook, which cannot be taken out again and so is switched on and off."""

    def __init__(self) -> None:
        self.on = False
        self.installed = False
        self.seen: ViolationError | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event.startswith(_FORBIDDEN) and not _is_ours(event, arguments):
            self.seen = ViolationError(f"{event} {arguments!r:.200}")
            raise self.seen


def _is_ours(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether it is only a look at the programs that come with ucp."""
    if event == "open" and arguments[1] not in ("r", "rb"):
        return False
    return event in _LOOKS and os.path.realpath(str(arguments[0])).startswith(_PROGRAMS)


_HOOK = _Hook()


@contextmanager
def sealed() -> Iterator[None]:
    """Inside, whatever would import, run, open or connect raises ViolationError."""
    if not _HOOK.installed:
        sys.addaudithook(_HOOK)
        _HOOK.installed = True
    _HOOK.on, _HOOK.seen = True, None
    try:
        yield
    finally:
        _HOOK.on = False
    if _HOOK.seen is not None:  # whatever became of it on the way
        raise _HOOK.seen


def attempt(read: Callable[[], object]) -> UcpError | None:
    """Call `read` sealed. None for a result, the error for a refusal; anything else it raises is raised."""
    with sealed():
        try:
            read()
        except UcpError as error:
            return error
    return None


def watched(read: Callable[[], object], size: int, allowance: Allowance) -> Cost:
    """Like `attempt` with the cost of an input of `size` bytes; ViolationError where that is more than allowed.

    It is run twice: counting lines makes memory of its own. That comes first, since it ends what would not end.
    """
    lines = count_lines(read, allowance.lines + allowance.lines_per_byte * size)
    most = allowance.memory + allowance.memory_per_byte * size
    memory, error = peak(read)
    if memory > most:
        raise ViolationError(f"takes {memory} bytes of memory for {size} bytes of input; allowed: {most}")
    return Cost(error, lines, memory)


def peak(read: Callable[[], object]) -> tuple[int, UcpError | None]:
    """The most bytes that Python and numpy held at once, above those held before; and the refusal."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        error = attempt(read)
        return tracemalloc.get_traced_memory()[1] - before, error
    finally:
        tracemalloc.stop()


def count_lines(read: Callable[[], object], most: int) -> int:
    """How many lines of Python it takes; ViolationError past `most`, which ends even a loop without end."""
    count = 0

    def trace(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count > most:
                raise ViolationError(f"takes more than {most} steps")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        attempt(read)
    finally:
        sys.settrace(before)
    return count
