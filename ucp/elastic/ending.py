"""How a process of an elastic job ends when something failed: at once, whatever it was doing."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from ucp.errors import UcpError

_log = logging.getLogger("ucp")

_MOMENT = 3.0
"""Seconds that a process which leaves has for its last words."""


class Mortal:
    """While on, SIGTERM ends the process at once: that is how an agent of torchrun asks for a new start.

    A handler in Python would not be heard by a thread that waits for a collective of ranks that are gone.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._on = False

    def begin(self) -> None:
        """Give SIGTERM its own meaning. Only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before, self._on = signal.signal(signal.SIGTERM, signal.SIG_DFL), True
            if callable(self._before):
                _log.warning("SIGTERM ends this process at once now; its handler is put back when the run is over")

    def end(self) -> None:
        """Give the signal back, but for what somebody else took since."""
        if self._on and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        self._on = False


def leave(code: int, last: Callable[[], object] = lambda: None) -> NoReturn:
    """End the process without finalising anything that may wait for ranks that are gone.

    What is to be done `last`, and what was printed, has a moment: nobody may read what this process prints any more.
    """

    def end() -> None:
        with suppress(Exception):
            last()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()

    try:
        ender = threading.Thread(target=end, name="ucp-end", daemon=True)
        ender.start()
        ender.join(_MOMENT)
    finally:
        os._exit(code)


def leave_with(error: BaseException) -> None:
    """End the process at once when nobody catches `error`, and its traceback is printed.

    Who does catch it goes on undisturbed. A SystemExit keeps its code.
    """
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        # Functions that are registered last are called first: before anybody waits for threads.
        threading._register_atexit(leave, code)  # type: ignore[attr-defined]
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], found: BaseException, trace: TracebackType | None) -> None:
        try:
            before(kind, found, trace)
        finally:
            if _comes_of(found, error):
                leave(1)

    sys.excepthook = hook


def _comes_of(found: BaseException, error: BaseException) -> bool:
    """Whether `found` is `error`, has it in a group, or was raised because of it or while it was handled."""
    seen: set[int] = set()
    left: list[BaseException | None] = [found]
    while left:
        one = left.pop()
        if one is error:
            return True
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            left += [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
    return False


def told(error: BaseException) -> str:
    """One line of what an exception says."""
    text = error.message if isinstance(error, UcpError) else str(error)
    return f"{type(error).__name__}: {text}".splitlines()[0]
