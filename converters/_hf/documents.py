"""JSON documents in a folder of somebody else: read inertly, never above a sane size, names never twice."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from ucp.errors import CorruptError
from ucp.store import Entry, Store

_MOST_BYTES = 64 << 20
_AGAIN = "get the file again from where it was written"


def read_document(store: Store, path: str) -> tuple[dict[str, Any], Entry]:
    """The JSON object at `path`; CorruptError if it is none, NotFoundError if there is no such file."""
    entry = store.entry(path)
    where = f"{store.url}/{path}"
    if entry.size > _MOST_BYTES:
        raise CorruptError(f"{where}: {entry.size} bytes are too many for such a file", hint=_AGAIN)
    try:
        found = json.loads(store.read(path, 0, entry.size).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: not JSON: {error}", hint=_AGAIN) from None
    if not isinstance(found, dict):
        raise CorruptError(f"{where}: a JSON {type(found).__name__} and not an object", hint=_AGAIN)
    return found, entry


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} twice in one object")
    return made
