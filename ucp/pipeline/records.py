"""What is known of each checkpoint of a pipeline: verified, to be removed, or failed and when to try again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from ucp.errors import NotFoundError
from ucp.pipeline.control import FOLDER, VERSION, put_document, read_document
from ucp.store import Store

State = Literal["verified", "retired", "damaged", "failed"]
_STATES = ("verified", "retired", "damaged", "failed")
_RECORDS = FOLDER + "records/"


@dataclass(frozen=True, slots=True)
class Record:
    """One checkpoint, by the `name` of its folder under both prefixes.

    ``verified``: it is whole under the destination; `about` says what it is.
    ``retired``: it was, and is removed when `since` (seconds of the epoch) is long enough ago.
    ``damaged``: it turned out not to be what it should, and is being removed.
    ``failed``: `about` says why, and how often; it is tried again after `since`, or when the source is not as `seen`.
    """

    name: str
    state: State
    about: Mapping[str, Any] = field(default_factory=dict)
    since: float = 0.0
    seen: str = ""

    @property
    def made(self) -> bool:
        """Whether there is a result, or what a deletion may have left of one."""
        return self.state != "failed"

    def as_state(self, state: State, since: float = 0.0) -> Record:
        """The same checkpoint in another state."""
        return replace(self, state=state, since=since)

    @classmethod
    def of(cls, document: Mapping[str, Any] | None, name: str) -> Self | None:
        """The record in a document; None for what is none."""
        if document is None or document.get("version") != VERSION or document.get("name") != name:
            return None
        state, about, since, seen = (document.get(key) for key in ("state", "about", "since", "seen"))
        if state not in _STATES or not isinstance(about, dict):
            return None
        if not isinstance(since, int | float) or not isinstance(seen, str):
            return None
        return cls(name, state, about, since, seen)


class Records:
    """The records of a destination. Those that did not change are read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._read: dict[str, tuple[str, Record | None]] = {}

    def all(self) -> dict[str, Record]:
        """By name, as they are now. A damaged record is none: what it tells is found out again."""
        found: dict[str, tuple[str, Record | None]] = {}
        for entry in self.store.entries(_RECORDS):
            name = entry.path.removeprefix(_RECORDS).removesuffix(".json")
            known = self._read.get(name)
            if known is None or known[0] != entry.fingerprint:
                document, _ = read_document(self.store, entry.path)
                known = (entry.fingerprint, Record.of(document, name))
            found[name] = known
        self._read = found
        return {name: record for name, (_, record) in found.items() if record is not None}

    def one(self, name: str) -> Record | None:
        """A record as it is now."""
        return self._now(name)[0]

    def change(self, record: Record, *, was: Record | None) -> bool:
        """Put `record` in place of `was`; False if that is not what is there, or any more."""
        now, seen = self._now(record.name)
        document = {"version": VERSION, **asdict(record)}
        return now == was and put_document(self.store, _path(record.name), document, over=seen)

    def remove(self, name: str) -> None:
        """Forget a checkpoint."""
        self.store.delete(_path(name))

    def _now(self, name: str) -> tuple[Record | None, str | None]:
        document, seen = read_document(self.store, _path(name))
        return Record.of(document, name), seen


def _path(name: str) -> str:
    return f"{_RECORDS}{name}.json"


def is_there(store: Store, about: Mapping[str, Any], name: str) -> bool:
    """Whether the checkpoint that a record or a pointer is `about` has its root object."""
    root = about.get("root")
    if not isinstance(root, str):
        return False
    try:
        return store.child(name).exists(root)
    except NotFoundError:
        return False
