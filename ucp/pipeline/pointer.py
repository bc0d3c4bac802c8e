"""The pointer: one small object that names the newest verified checkpoint, for those who read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.pipeline.control import natural, put_document, read_document
from ucp.pipeline.records import Record, Records, is_there
from ucp.store import Store

FORMAT = "ucp-pointer"
VERSION = 1
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Published:
    """What the pointer says: the `name` of a checkpoint, and what it is `about` (URL, step, family, digest, …)."""

    name: str
    about: Mapping[str, Any] = field(default_factory=dict)


class Pointer:
    """The pointer at `path` of a destination. It only ever moves to newer checkpoints, unless its own has vanished."""

    def __init__(self, store: Store, path: str) -> None:
        self.store, self.path = store, path

    def read(self) -> tuple[Published | None, str | None]:
        """What it says, and its fingerprint; None for what it does not say."""
        document, seen = read_document(self.store, self.path)
        if document is None or document.get("format") != FORMAT or document.get("version") != VERSION:
            return None, seen
        name, about = (
            document.get("name"),
            {k: v for k, v in document.items() if k not in ("format", "version", "name")},
        )
        return (Published(name, about) if isinstance(name, str) else None), seen

    def publish(self, record: Record, records: Records) -> Published | None:
        """Have the pointer name the checkpoint of `record`, or a newer one; what it names now, if this changed it.

        It is looked at again afterwards whether the checkpoint is to be removed: whoever removes one says so first, and
        looks at the pointer then. One of the two sees the other.
        """
        wanted: Record | None = record
        changed, marked = None, set[str]()
        for _ in range(_ATTEMPTS):
            now, seen = self.read()
            if wanted is None or (now is not None and now.name not in marked and self._stays(now, wanted)):
                return changed
            about = {name: value for name, value in wanted.about.items() if value is not None}
            document = {"format": FORMAT, "version": VERSION, "name": wanted.name, **about}
            if not put_document(self.store, self.path, document, over=seen):
                continue
            changed = Published(wanted.name, about)
            after = records.one(wanted.name)
            if after is not None and after.state == "verified":
                return changed
            marked.add(wanted.name)
            wanted = _newest(records)
        return changed

    def _stays(self, now: Published, wanted: Record) -> bool:
        same = now.name == wanted.name and now.about.get("digest") == wanted.about.get("digest")
        newer = natural(now.name) > natural(wanted.name)
        return same or (newer and is_there(self.store, now.about, now.name))


def _newest(records: Records) -> Record | None:
    found = [record for record in records.all().values() if record.state == "verified"]
    return max(found, key=lambda record: natural(record.name), default=None)
