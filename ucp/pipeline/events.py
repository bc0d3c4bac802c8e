"""What a watcher tells: events while it is at work, failures, and what a pass left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import UcpError
from ucp.pipeline.pointer import Published
from ucp.pipeline.records import Record


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a checkpoint: `kind` is a stable word, `detail` holds JSON values.

    ``converting``, ``verifying``, ``verified``, ``published``, ``retired``, ``pruned``; ``incomplete`` (no checkpoint
    yet), ``busy`` (another watcher has it), ``failed``.
    """

    kind: str
    name: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """A checkpoint that could not be converted or verified, and when it is tried again (seconds from now)."""

    name: str
    code: str
    message: str
    hint: str | None
    exit_code: int
    attempts: int
    retry_in: float

    @property
    def detail(self) -> dict[str, Any]:
        """As an event tells it."""
        return {key: getattr(self, key) for key in self.__slots__ if key != "name"}


@dataclass(slots=True)
class Outcome:
    """What a pass left: names of what is `kept`, newest first; of what is `busy`, `incomplete`; and what `failed`."""

    kept: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    published: Published | None = None


def failure_of(name: str, error: Exception, attempts: int, wait: float) -> Failure:
    """The failure that an exception is."""
    if isinstance(error, UcpError):
        return Failure(name, error.code, error.message, error.hint, error.exit_code, attempts, wait)
    hint = "this is a bug in ucp; please report it with the output of `ucp convert -v`"
    return Failure(name, UcpError.code, f"{type(error).__name__}: {error}", hint, UcpError.exit_code, attempts, wait)


def failure_in(record: Record) -> Failure:
    """The failure that a record tells."""
    about = record.about
    return Failure(
        record.name,
        str(about.get("code", UcpError.code)),
        str(about.get("message", "")),
        about.get("hint"),
        int(about.get("exit_code", UcpError.exit_code)),
        int(about.get("attempts", 1)),
        max(0.0, record.since - time.time()),
    )
