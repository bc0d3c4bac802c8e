"""Asking for many objects one by one, where a store has no lists."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from ucp.errors import NotFoundError
from ucp.store.base import Entry, Store


def entries_at(store: Store, paths: Iterable[str]) -> list[Entry]:
    """The entries of those of `paths` at which there is an object, as many requests at once as pay."""

    def look(path: str) -> Entry | None:
        try:
            return store.entry(path)
        except NotFoundError:
            return None

    with ThreadPoolExecutor(store.parallel, thread_name_prefix="ucp-entries") as pool:
        return [entry for entry in pool.map(look, paths) if entry is not None]
