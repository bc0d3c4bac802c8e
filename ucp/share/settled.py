"""Reading an object that others may replace at any time, as one whole."""

from __future__ import annotations

from ucp.errors import ConflictError, CorruptError
from ucp.store import Store

_TRIES = 10


def read_settled(store: Store, path: str) -> tuple[bytes, str]:
    """The bytes of an object, and the fingerprint that belongs to them; NotFoundError if there is none.

    ConflictError if it is replaced again and again meanwhile.
    """
    for _ in range(_TRIES):
        before = store.entry(path)
        try:
            data = store.read(path, 0, before.size)
        except CorruptError:
            if store.entry(path).fingerprint == before.fingerprint:
                raise
            continue
        if store.entry(path).fingerprint == before.fingerprint:
            return data, before.fingerprint
    raise ConflictError(f"{store.url}/{path}: changes all the time", hint="wait until whoever writes it ends")


__all__ = ["read_settled"]
