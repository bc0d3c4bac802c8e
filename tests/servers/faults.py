"""What the proxy can do to an exchange, as plain data."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of trouble; `kind` is the name that it is counted under."""

    kind: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class ResetBefore(Fault):
    """The connection is reset and the server never sees the request."""

    kind: ClassVar[str] = "reset before the request"


@dataclass(frozen=True, slots=True)
class ResetDuringRequest(Fault):
    """The server gets the first `share` of the body, then both connections are reset."""

    kind: ClassVar[str] = "reset in a request's body"
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class LostAnswer(Fault):
    """The server did what was asked; its answer is lost in a reset."""

    kind: ClassVar[str] = "answer lost"


@dataclass(frozen=True, slots=True)
class ResetDuringAnswer(Fault):
    """The connection is reset after the first `share` of the answer's body."""

    kind: ClassVar[str] = "reset in an answer's body"
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class Truncate(Fault):
    """The answer's body ends after `share` of it.

    With `honest` the head claims the full length and the connection is closed early; else it claims the short length,
    so that nothing in the answer shows that bytes are missing.
    """

    kind: ClassVar[str] = "answer cut short"
    share: float = 0.5
    honest: bool = True


@dataclass(frozen=True, slots=True)
class Refuse(Fault):
    """The proxy answers with an error status itself; `retry_after` in seconds.

    Its body quotes the request's head, as services quote what was signed (``StringToSign``).
    """

    kind: ClassVar[str] = "error status"
    status: int = 503
    code: str = "SlowDown"
    retry_after: int | None = None


@dataclass(frozen=True, slots=True)
class Delay(Fault):
    """The request waits before it goes on."""

    kind: ClassVar[str] = "delay"
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Hold(Fault):
    """The request waits before it goes on, until somebody sets the event."""

    kind: ClassVar[str] = "held"
    until: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Trickle(Fault):
    """The answer's body comes in `piece` bytes every `seconds`."""

    kind: ClassVar[str] = "slow trickle"
    piece: int = 4096
    seconds: float = 0.05


@dataclass(frozen=True, slots=True)
class FlipInAnswer(Fault):
    """One bit of the answer's body is flipped, somewhere."""

    kind: ClassVar[str] = "bit flipped in an answer"


@dataclass(frozen=True, slots=True)
class FlipInRequest(Fault):
    """One bit of the request's body is flipped on its way to the server."""

    kind: ClassVar[str] = "bit flipped in a request"


@dataclass(frozen=True, slots=True)
class Header(Fault):
    """A header of the answer has another value; None removes it. A name that the answer lacks is added."""

    kind: ClassVar[str] = "wrong header"
    name: str = "ETag"
    value: str | None = '"00000000000000000000000000000000"'


@dataclass(frozen=True, slots=True)
class Without(Fault):
    """A header of the request is lost on its way, such as the Range by which a part is asked for."""

    kind: ClassVar[str] = "request's header lost"
    name: str = "Range"


@dataclass(frozen=True, slots=True)
class Stale(Fault):
    """The answer is what this target answered at first, as a listing that lags behind."""

    kind: ClassVar[str] = "stale answer"


@dataclass(slots=True)
class Rule:
    """When `fault` strikes: requests of `method` whose target (path and query) matches the expression `target`.

    The first `skip` of those pass, then it strikes up to `count` times (None: always), each with `probability`.
    `body` is the smallest body of the request, in bytes, that it strikes.
    """

    fault: Fault
    method: str = ".*"
    target: str = ""
    skip: int = 0
    count: int | None = 1
    probability: float = 1.0
    body: int = 0
    struck: int = field(default=0, init=False)

    def matches(self, method: str, target: str, body: int) -> bool:
        """Whether the rule is about this request and not used up."""
        if self.count is not None and self.struck >= self.count:
            return False
        if body < self.body or not re.fullmatch(self.method, method) or not re.search(self.target, target):
            return False
        if self.skip:
            self.skip -= 1
            return False
        return True
