"""A checkpoint that is rewritten while it is read would be a mixture of two: noticed by fingerprints, after reading."""

from __future__ import annotations

from collections.abc import Iterable

from ucp.catalog import Catalog
from ucp.errors import CorruptError
from ucp.store import Store


def check_unchanged(
    store: Store, catalog: Catalog, paths: Iterable[str], *, hint: str = "open the checkpoint again"
) -> None:
    """CorruptError, with `hint`, if one of the objects at `paths` is not the one that the catalog was made from."""
    for path in paths:
        if path in catalog.objects and store.entry(path).fingerprint != catalog.objects[path][1]:
            raise CorruptError(f"{store.url}/{path}: was changed after it was opened", hint=hint)
