"""Storage behind URLs: local folders, and everything fsspec knows."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from ucp.errors import UsageError
from ucp.store.base import Buffer, Entry, Store, Writer
from ucp.store.cloud import SCHEMES, open_cloud
from ucp.store.local import LocalStore
from ucp.store.single import SingleStore

OPENERS: dict[str, Callable[..., Store]] = {}
"""Stores of further schemes, by scheme: called with the URL and the options. Tests put theirs here."""


def open_store(url: str, **options: Any) -> Store:
    """The store at `url`: a local path, ``file://…`` or any protocol that fsspec knows (``memory://…``).

    A local path may begin with ``~``; a ``file`` URL is taken as it is, with no escapes. Nothing is created or checked;
    `options` go to the client or the fsspec file system. UsageError for an unknown protocol, an empty path, or a file
    of another host.
    """
    if "UCP_METRICS" in os.environ:
        from ucp.metrics import start_as_asked

        start_as_asked()
    scheme, sign, rest = url.partition("://")
    scheme, url = (scheme.lower(), f"{scheme.lower()}://{rest}") if sign and "::" not in scheme else (scheme, url)
    if not sign and url.startswith("file:"):
        raise UsageError(f"{url!r} is no URL of a file", hint=f"file://{url.removeprefix('file:')} is one")
    if sign and scheme in OPENERS:
        return OPENERS[scheme](url, **options)
    if not sign or scheme in ("file", "local"):
        return LocalStore(_local_path(url, rest) if sign else os.path.expanduser(_given(url, url)))
    if scheme in SCHEMES:
        return open_cloud(url, options)
    from ucp.store.general import FsspecStore

    return FsspecStore(url, options)


def _given(path: str, url: str) -> str:
    if not path:
        raise UsageError(f"{url!r} names no folder", hint="give a path; . is the current folder")
    return path


def _local_path(url: str, rest: str) -> str:
    """The path of a ``file`` URL, whose host may only be this one (RFC 8089)."""
    path = _given(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest, url)
    if not path.startswith("/"):
        raise UsageError(f"{url!r} names a file of another host", hint="file:///folder is a local one")
    return path


def open_source(url: str) -> Store:
    """The store at `url`, or, where that is the URL of a file, one that holds that file alone.

    Elsewhere than on a local file system only what has a dot in its name, and no ``/`` behind it, is looked for as a
    file.
    """
    store = open_store(url)
    if isinstance(store, LocalStore):
        folder, name = os.path.split(store.root)
        return SingleStore(LocalStore(folder), name) if os.path.isfile(store.root) else store
    address, sign, query = url.partition("?") if url.startswith(("http://", "https://")) else (url, "", "")
    top, _, name = address.rpartition("/")
    if "." in name and not top.endswith("/") and (parent := open_store(top + sign + query)).exists(unquote(name)):
        return SingleStore(parent, unquote(name))
    return store


__all__ = ["OPENERS", "Buffer", "Entry", "LocalStore", "SingleStore", "Store", "Writer", "open_source", "open_store"]
