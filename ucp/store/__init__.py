"""Storage behind URLs: local folders, and everything fsspec knows."""

from __future__ import annotations

from typing import Any

from ucp.store.base import Buffer, Entry, Store, Writer
from ucp.store.local import LocalStore


def open_store(url: str, **options: Any) -> Store:
    """The store at `url`: a local path, ``file://…`` or any protocol that fsspec knows (``memory://…``).

    Nothing is created or checked; `options` go to the fsspec file system. UsageError for an unknown protocol.
    """
    if url.startswith("file://"):
        return LocalStore(url.removeprefix("file://"))
    if "://" not in url:
        return LocalStore(url)
    from ucp.store.general import FsspecStore

    return FsspecStore(url, options)


__all__ = ["Buffer", "Entry", "LocalStore", "Store", "Writer", "open_store"]
