"""A copy that was complete once, looked after: what it has lost since comes from its source again."""

from __future__ import annotations

from ucp.format.pool import POOL
from ucp.lifecycle.carry import Carrier, How, Moved
from ucp.lifecycle.contents import Contents
from ucp.lifecycle.pooled import shared_there
from ucp.run.destination import lost
from ucp.store import Store


def mend(contents: Contents, destination: Store, how: How) -> Moved:
    """Copy again what the copy of `contents`, whose root is there, lacks or has with another size; one listing.

    What it shares in the pool of its run, too. If `how` verifies, everything is read, and what is damaged is copied
    again as well. What was copied is read back. Nothing of a damaged source takes the place of what is there.

    CorruptError and NotFoundError for what the source has not whole either; ConflictError, StorageError.
    """
    carrier = Carrier(contents, destination, how)
    with destination.exclusive():
        _mend_pool(carrier)
        if how.verify:
            wrong = carrier.damaged([*contents.objects.values()])
        else:
            sizes = {entry.path: entry.size for entry in contents.objects.values()}
            wrong = [contents.objects[path] for path in lost(destination, sizes)]
        if wrong:
            carrier.again(wrong)
    return carrier.moved


def _mend_pool(carrier: Carrier) -> None:
    """Have what is shared in the pool of the destination; nothing is read there unless everything is to be."""
    contents, destination = carrier.contents, carrier.destination
    before = _pooled(contents, destination)
    if not carrier.how.verify and all(before.get(name, (-1,))[0] == size for name, size in contents.shared.items()):
        return
    with shared_there(contents, destination) as confirm:
        confirm()
    after = _pooled(contents, destination)
    carrier.moved.copied += sum(size for name, (size, _) in after.items() if after[name] != before.get(name))


def _pooled(contents: Contents, destination: Store) -> dict[str, tuple[int, str]]:
    """Size and fingerprint of what there is in the pool of what `contents` shares."""
    if not contents.shared:
        return {}
    listed = destination.sibling(POOL).entries()
    return {entry.path: (entry.size, entry.fingerprint) for entry in listed if entry.path in contents.shared}


__all__ = ["mend"]
