"""Trying again: exponential back-off with full jitter, bounded in number and in time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from ucp.store.cloud.failure import Failure, Kind, RequestError, classify
from ucp.store.traffic import TRAFFIC

T = TypeVar("T")
ATTEMPTS = 12
SECONDS = 180.0
_FEW = 3
"""Attempts where waiting seldom helps: no credentials to be had, or a server that answers nonsense."""


@dataclass(frozen=True, slots=True)
class Policy:
    """At most `attempts`, none begun after `seconds`; waits are random up to `base` · 2ⁿ, at most `longest`."""

    attempts: int = ATTEMPTS
    seconds: float = SECONDS
    base: float = 0.1
    longest: float = 15.0

    def wait(self, failed: int) -> float:
        """Seconds to wait after the attempt number `failed`, counted from 1."""
        return random.uniform(0, min(self.longest, self.base * 2.0**failed))

    def off(self) -> dict[str, Any]:
        """No retries, as settings of the client."""
        return {"max_retries": 0}

    def on(self) -> dict[str, Any]:
        """The same policy as settings of the client, which then tries again by itself."""
        backoff = {
            "init_backoff": timedelta(seconds=self.base),
            "max_backoff": timedelta(seconds=self.longest),
            "base": 2,
        }
        retries = max(self.attempts - 1, 0)
        return {"max_retries": retries, "retry_timeout": timedelta(seconds=self.seconds), "backoff": backoff}

    def allows(self, failure: Failure, failed: int, elapsed: float) -> bool:
        """Whether to try again after `failed` attempts."""
        most = min(_FEW, self.attempts) if failure.kind is Kind.CREDENTIALS else self.attempts
        return failure.passing and failed < most and elapsed < self.seconds


@dataclass(slots=True)
class Trial:
    """What became of a request on the way: whether an attempt failed in a way that may have worked after all."""

    unsure: bool = False


def persistently(
    policy: Policy,
    source: tuple[str, str],
    call: Callable[[], T],
    *,
    read: int | Callable[[T], int] = 0,
    written: int = 0,
    trial: Trial | None = None,
) -> T:
    """What `call` returns, tried again where that may help; RequestError when it is given up.

    `source` is the scheme and the operation that are counted, with the bytes `read` or `written` by a success; the
    former may depend on what `call` returned.
    """
    begun, failed = time.monotonic(), 0
    while True:
        outcome = _attempt(call)
        if not isinstance(outcome, _Failed):
            TRAFFIC.request(*source, read=read(outcome) if callable(read) else read, written=written)
            return outcome
        failed += 1
        failure, elapsed = outcome.failure, time.monotonic() - begun
        if trial is not None:
            trial.unsure |= failure.unsure
        if not policy.allows(failure, failed, elapsed):
            TRAFFIC.request(*source) if failure.answer else TRAFFIC.failed(*source)
            raise RequestError(failure, failed, elapsed)
        wait = policy.wait(failed)
        TRAFFIC.retried(source[0], failure.kind.name.lower(), wait)
        time.sleep(wait)


@dataclass(frozen=True, slots=True)
class _Failed:
    failure: Failure


def _attempt(call: Callable[[], T]) -> T | _Failed:
    """Run `call`; the exception does not leave, so that none of its text is chained to what is raised."""
    try:
        return call()
    except RequestError as error:
        return _Failed(error.failure)
    except Exception as error:
        if not _from_client(error):
            raise
        return _Failed(classify(error))


def _from_client(error: Exception) -> bool:
    """Whether the client raised it: its own errors, and the built-in ones it uses for what is missing or unwelcome."""
    return type(error).__module__.startswith("obstore") or isinstance(error, FileNotFoundError | ValueError)
