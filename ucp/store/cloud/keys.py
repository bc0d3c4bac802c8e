"""Which paths object stores can hold under exactly their name."""

from __future__ import annotations

import re

from ucp.errors import UsageError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_path(path: str, url: str) -> None:
    """UsageError if `path` leaves the folder `url`, or has parts that are empty, dots or control characters.

    Object stores would take some of these as names, file systems would not, and the client changes them.
    """
    odd = bool(path) and any(part in ("", ".", "..") for part in path.split("/"))
    if odd or _CONTROL.search(path):
        raise UsageError(f"{path!r} is not a path inside {url}")
