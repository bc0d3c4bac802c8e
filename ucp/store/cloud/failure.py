"""What a failed request means: obstore tells it as text, with URLs, signatures and whole answers in it.

Nothing of that text is shown, but the status and the service's own word for it (``SlowDown``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from ucp.errors import CorruptError, NotFoundError, StorageError, UcpError


class Kind(Enum):
    """What to do about it."""

    MISSING = "no such object"
    DENIED = "access denied"
    CREDENTIALS = "no credentials"
    CONDITION = "a condition does not hold"
    PAST_END = "the range begins past the end"
    NO_RANGES = "the server ignores ranges"
    THROTTLED = "throttled"
    SERVER = "server error"
    TIMEOUT = "timed out"
    RESET = "connection failed"
    TRUNCATED = "answer cut short"
    REFUSED = "refused"


NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
"""Words for a bucket that is not there."""

PASSING = (Kind.THROTTLED, Kind.SERVER, Kind.TIMEOUT, Kind.RESET, Kind.TRUNCATED, Kind.CREDENTIALS)
"""Kinds that may pass when tried again."""

_STATUS = re.compile(r"status code: (\d{3})|\bstatus: (\d{3})\b")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>")
_OF_STATUS = {
    401: Kind.DENIED,
    403: Kind.DENIED,
    404: Kind.MISSING,
    408: Kind.TIMEOUT,
    410: Kind.MISSING,
    412: Kind.CONDITION,
    416: Kind.PAST_END,
    425: Kind.THROTTLED,
    429: Kind.THROTTLED,
    501: Kind.REFUSED,
    503: Kind.THROTTLED,
    505: Kind.REFUSED,
    509: Kind.THROTTLED,
}
_OF_CODE = {
    "SlowDown": Kind.THROTTLED,
    "ServerBusy": Kind.THROTTLED,
    "RequestTimeout": Kind.TIMEOUT,
    "OperationTimedOut": Kind.TIMEOUT,
    "InternalError": Kind.SERVER,
    "ConditionalRequestConflict": Kind.SERVER,
    "OperationAborted": Kind.SERVER,
    "ExpiredToken": Kind.DENIED,
    "InvalidAccessKeyId": Kind.DENIED,
}
"""Words of S3 and Azure that say more than their status: 400 RequestTimeout and 409 ConditionalRequestConflict pass."""

_IN_TEXT = (
    ("169.254.169.254", Kind.CREDENTIALS),
    ("169.254.170.2", Kind.CREDENTIALS),
    ("metadata.google.internal", Kind.CREDENTIALS),
    ("metadata/identity", Kind.CREDENTIALS),
    ("login.microsoftonline", Kind.CREDENTIALS),
    ("oauth2.googleapis.com", Kind.CREDENTIALS),
    ("Azure CLI", Kind.CREDENTIALS),
    ("Wanted range starting at", Kind.PAST_END),
    ("Range request not supported", Kind.NO_RANGES),
    ("non-partial response", Kind.NO_RANGES),
    # What Azurite says of an empty object: "bytes 0--1/0".
    ("CONTENT_RANGE", Kind.NO_RANGES),
    ("TimedOut", Kind.TIMEOUT),
    ("operation timed out", Kind.TIMEOUT),
    ("response body error", Kind.TRUNCATED),
    ("Requested ", Kind.TRUNCATED),
    ("error sending request", Kind.RESET),
    ("Error performing list request: ", Kind.TRUNCATED),
    ("Got invalid list response", Kind.TRUNCATED),
    ("Got invalid bulk delete response", Kind.TRUNCATED),
    ("HTTP error", Kind.RESET),
)


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed request: its kind, the HTTP status where there was an answer, and the service's word for it."""

    kind: Kind
    status: int = 0
    word: str = ""

    @property
    def passing(self) -> bool:
        """Whether trying again may help."""
        return self.kind in PASSING

    @property
    def answer(self) -> bool:
        """Whether the service answered what it was asked, if not with what was hoped for."""
        return self.kind in (Kind.MISSING, Kind.CONDITION, Kind.PAST_END)

    @property
    def unsure(self) -> bool:
        """Whether the server may have done what it was asked: no answer came, or one of a gateway."""
        return self.kind in (Kind.TIMEOUT, Kind.RESET, Kind.TRUNCATED, Kind.SERVER, Kind.THROTTLED)

    @property
    def text(self) -> str:
        """For people."""
        said = " ".join(filter(None, (str(self.status or ""), self.word)))
        return f"{self.kind.value} ({said})" if said else self.kind.value


def classify(error: BaseException) -> Failure:
    """The failure that an exception of obstore tells of."""
    text = str(error)
    found = _STATUS.search(text)
    status = int(found[1] or found[2]) if found else 0
    code = _CODE.search(text)
    word = code[1] if code else ""
    if word in _OF_CODE:
        return Failure(_OF_CODE[word], status, word)
    for part, kind in _IN_TEXT[:8]:
        if part in text:
            return Failure(kind, status)
    if status:
        return Failure(_of_status(error, status), status, word)
    if isinstance(error, FileNotFoundError):
        return Failure(Kind.MISSING)
    found_in = (kind for part, kind in _IN_TEXT if part in text)
    return next((Failure(kind) for kind in found_in), Failure(Kind.REFUSED, 0, _plain(text)))


def _of_status(error: BaseException, status: int) -> Kind:
    if status >= 500:
        return _OF_STATUS.get(status, Kind.SERVER)
    # 409 is how Azure says that a blob is there already; 304 is how some servers answer If-None-Match.
    if type(error).__name__ in ("AlreadyExistsError", "PreconditionError", "NotModifiedError"):
        return Kind.CONDITION
    return _OF_STATUS.get(status, Kind.REFUSED)


def _plain(text: str) -> str:
    """The first line of an error that no answer caused, such as a setting that is missing; without URLs."""
    line = re.sub(r"\S+://\S+", "***", text.partition("\n")[0])
    return line[:200] if "signature" not in line.lower() else ""


class RequestError(Exception):
    """A request that was given up, after `attempts` in `seconds`."""

    def __init__(self, failure: Failure, attempts: int, seconds: float) -> None:
        super().__init__(failure.text)
        self.failure = failure
        self.attempts = attempts
        self.seconds = seconds

    def public(self, url: str) -> UcpError:
        """The same as an error of ucp that names `url`."""
        kind, text = self.failure.kind, self.failure.text
        if kind is Kind.MISSING:
            return _missing(url, self.failure.word)
        if kind is Kind.PAST_END:
            return CorruptError(f"{url}: ends early", hint="the object is truncated")
        hint = _HINTS.get(kind, "run the same command again: it resumes")
        if self.failure.passing:
            text = f"{text}; tried {self.attempts} times in {self.seconds:.0f} s"
        return StorageError(f"{url}: {text}", hint=hint)


_HINTS = {
    Kind.DENIED: "check the credentials and what they permit; a service may also say this of what is not there",
    Kind.CREDENTIALS: "give credentials by the environment or a profile, or anonymous access (docs/storage.md)",
    Kind.NO_RANGES: "this server cannot serve parts of an object; copy the checkpoint elsewhere first",
    Kind.RESET: "check the address and the network; run the same command again: it resumes",
    Kind.REFUSED: "check the bucket, the region and the endpoint (docs/storage.md)",
}


def _missing(url: str, word: str) -> NotFoundError:
    if word in NO_BUCKET:
        return NotFoundError(f"{url}: there is no such bucket", hint="create it first, or check its name and region")
    return NotFoundError(f"{url}: no such object")
