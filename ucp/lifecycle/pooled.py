"""What a checkpoint shares with others of its run, copied into the pool of another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ucp.errors import ConflictError, CorruptError
from ucp.format.pool import POOL, content_name, path_of
from ucp.lifecycle.contents import Contents
from ucp.share.lease import Lease, put_shared
from ucp.store import Store


@contextmanager
def shared_there(contents: Contents, destination: Store) -> Iterator[Callable[[], None]]:
    """What `contents` shares is in the pool beside `destination` while inside; gives what confirms it before the root.

    What was there before is read once per process, and put right if it is damaged.
    ConflictError where the collector of garbage is about to remove some of it, CorruptError for what has not the bytes
    of its name.
    """
    if not contents.shared:
        yield lambda: None
        return
    pool = destination.sibling(POOL)
    lease = Lease(pool, destination.url.rstrip("/").rpartition("/")[2])
    try:
        for name, size in contents.shared.items():
            if not lease.offer.takes(name):
                raise ConflictError(
                    f"{pool.url}/{name}: is being collected", hint="run `ucp gc` there once more, then this again"
                )
            if not lease.offer.has(pool, name, size):
                put_shared(pool, _bytes(contents.store, path_of(name), name, size), name)
            lease.keep()
        yield lambda: lease.confirm(contents.shared)
    finally:
        lease.release()


def _bytes(store: Store, path: str, name: str, size: int) -> bytes:
    data = store.read(path, 0, size)
    if content_name(data) != name:
        raise CorruptError(f"{store.url}/{path}: has not the bytes of its name", hint="repair it first")
    return data
