"""What is known of every object of a checkpoint of another family: what a copy noted, or what its own files digest."""

from __future__ import annotations

from ucp.catalog import Checksum
from ucp.converter import find_converter
from ucp.lifecycle.arrival import recorded
from ucp.lifecycle.contents import COPIED
from ucp.lifecycle.form import Form
from ucp.plan import Key
from ucp.store import Store


def foreign_form(store: Store, url: str) -> Form:
    """Of a copy, its objects with their crc32c; else what the family's reader tells, such as the CRCs of zip entries.

    What the reader raises where neither can be had.
    """
    noted = recorded(store)
    if noted:
        checksums = tuple(Checksum(path, 0, size, "crc32c", value) for path, (size, value) in noted.items())
        return _form("copy", {path: size for path, (size, _) in noted.items()}, checksums)
    found, _ = find_converter(url)
    catalog = found.read(store)
    sizes = {path: size for path, (size, _) in catalog.objects.items() if path != COPIED}
    plain = {key: held for key, held in catalog.fragments.items() if key not in catalog.views}
    form = _form(found.family, sizes, tuple(catalog.checksums))
    specs = {
        Key(name, state): spec for name, tensor in catalog.tensors.items() for state, spec in tensor.states.items()
    }
    return Form(**{**vars(form), "specs": specs, "fragments": plain})


def _form(family: str, sizes: dict[str, int], checksums: tuple[Checksum, ...]) -> Form:
    return Form(
        family=family,
        root=b"",
        id="",
        files={},
        roles={},
        made={},
        digests=None,
        sizes=sizes,
        specs={},
        fragments={},
        checksums=lambda _: checksums,
        literals=lambda _: iter(()),
    )
