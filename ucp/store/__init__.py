"""Storage behind URLs: local folders, and everything fsspec knows."""

from __future__ import annotations

import os
from typing import Any

from ucp.errors import UsageError
from ucp.store.base import Buffer, Entry, Store, Writer
from ucp.store.local import LocalStore


def open_store(url: str, **options: Any) -> Store:
    """The store at `url`: a local path, ``file://…`` or any protocol that fsspec knows (``memory://…``).

    A local path may begin with ``~``; a ``file`` URL is taken as it is, with no escapes. Nothing is created or checked;
    `options` go to the fsspec file system. UsageError for an unknown protocol or an empty path.
    """
    scheme, sign, rest = url.partition("://")
    if not sign and url.startswith("file:"):
        raise UsageError(f"{url!r} is no URL of a file", hint=f"file://{url.removeprefix('file:')} is one")
    if not sign or scheme in ("file", "local"):
        path = rest if sign else os.path.expanduser(url)
        if not path:
            raise UsageError(f"{url!r} names no folder", hint="give a path; . is the current folder")
        return LocalStore(path)
    from ucp.store.general import FsspecStore

    return FsspecStore(url, options)


__all__ = ["Buffer", "Entry", "LocalStore", "Store", "Writer", "open_store"]
