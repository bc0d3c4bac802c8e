"""Signals by which a scheduler says that the job will be ended soon."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

from ucp.errors import UsageError

_log = logging.getLogger("ucp")

Signal = str | int


class Preemption:
    """Notes that one of `signals` came, until `restore` gives them back to whoever had them before."""

    def __init__(self, signals: Iterable[Signal]) -> None:
        self.signals = tuple(_signal(each) for each in signals)
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}
        self._process = 0

    def install(self) -> None:
        """Listen from now on; nothing happens if it does already. Python hears signals in its main thread only."""
        if self._before or not self.signals:
            return
        if threading.current_thread() is not threading.main_thread():
            names = " ".join(each.name for each in self.signals)
            _log.warning("%s cannot be listened to outside the main thread; preempt() says the same", names)
            return
        self._process = os.getpid()
        for each in self.signals:
            self._before[each] = signal.signal(each, self._note)

    def restore(self) -> None:
        """Undo `install`, but for what somebody else took since."""
        while self._before:
            each, before = self._before.popitem()
            if signal.getsignal(each) == self._note:
                signal.signal(each, before if before is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self.asked = True
            return
        # A forked child, such as a worker of a pool, is ended by the signal as it would be without us.
        before = self._before.get(signal.Signals(number))
        signal.signal(number, before if before is not None else signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _signal(given: Signal) -> signal.Signals:
    try:
        found = signal.Signals[given] if isinstance(given, str) else signal.Signals(given)
    except (KeyError, ValueError):
        raise UsageError(f"{given!r} is no signal", hint='for example "SIGTERM"') from None
    if found in (signal.SIGKILL, signal.SIGSTOP):
        raise UsageError(f"{found.name} cannot be listened to", hint="use SIGTERM or SIGUSR1")
    return found
