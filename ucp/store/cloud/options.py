"""Options of object storage: keywords of `ucp.store.open_store`, or variables of the environment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ucp.errors import UsageError

_PREFIX = "UCP_STORE_"
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class Options:
    """How to reach a service. None: what the environment says, else the default of the service.

    `endpoint` is the URL of the server, `profile` a profile of the shared configuration of AWS. `anonymous` sends no
    credentials, `requester_pays` has the reader pay. `sse` is ``AES256``, ``aws:kms``, ``aws:kms:dsse`` or ``sse-c``,
    with `sse_kms_key` the id of a key and `sse_customer_key` 32 bytes in base64. `concurrency` is how many requests
    run at once, `connect_timeout` and `read_timeout` are seconds without an answer, `attempts` and `retry_seconds`
    bound how often and how long a request is tried. `allow_http` permits what an ``http://`` endpoint implies.
    """

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    anonymous: bool | None = None
    requester_pays: bool | None = None
    sse: str | None = None
    sse_kms_key: str | None = None
    sse_customer_key: str | None = field(default=None, repr=False)
    concurrency: int | None = None
    connect_timeout: float | None = None
    read_timeout: float | None = None
    attempts: int | None = None
    retry_seconds: float | None = None
    allow_http: bool | None = None

    def resolved(self, bucket: str = "") -> Options:
        """These options, completed from variables: ``UCP_STORE__MY_BUCKET__ENDPOINT``, then ``UCP_STORE_ENDPOINT``.

        The first is for one bucket, here ``my-bucket``: what is no letter or digit is ``_`` in it.
        """
        own = f"{_PREFIX}_{re.sub(r'[^A-Z0-9]', '_', bucket.upper())}__"
        found = {name: self._variable(name, own) for name in _KINDS}
        given: dict[str, Any] = {name: _convert(name, variable) for name, variable in found.items() if variable}
        return replace(self, **given)

    def _variable(self, name: str, own: str) -> str | None:
        """The variable that says what is not given, if there is one."""
        if getattr(self, name) is not None:
            return None
        names = (f"{start}{name.upper()}" for start in (own, _PREFIX))
        return next((variable for variable in names if os.environ.get(variable)), None)


_KINDS = {entry.name: str(entry.type).partition(" ")[0] for entry in fields(Options)}


def options_from(given: dict[str, Any]) -> Options:
    """The options of the keywords `given`; UsageError for one that there is not, or of another type."""
    for name, value in given.items():
        if name not in _KINDS:
            raise UsageError(f"{name} is no option of object storage", hint=f"there are {', '.join(_KINDS)}")
        if value is not None and not isinstance(value, _TYPES[_KINDS[name]]):
            raise UsageError(f"{name} is {_KINDS[name]}, not {type(value).__name__}")
    return Options(**given)


_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}


def _convert(name: str, variable: str) -> object:
    """The text of a variable as a value; UsageError if it is none. The text is not shown: it may be a key."""
    text = os.environ[variable]
    try:
        match _KINDS[name]:
            case "bool":
                return _WORDS[text.lower()]
            case "int":
                return int(text)
            case "float":
                return float(text)
    except (KeyError, ValueError):
        raise UsageError(f"{variable} in the environment is no {_KINDS[name]}") from None
    return text
