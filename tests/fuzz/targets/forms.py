"""The project's own forms: manifests, training state and digests, signed anew so that the digests do not stop them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from crc32c import crc32c

from tests.fuzz.target import Target, store_of, use_catalog
from tests.fuzz.targets.folders import base
from ucp.converter import converter
from ucp.format.documents import canonical, root_digest

UNIVERSAL, NATIVE = "universal", "native"
_ROOT, _STATE, _DIGESTS = "zarr.json", "state.json", "digests.bin"


def _read(family: str, files: Mapping[str, bytes]) -> None:
    store = store_of(files)
    use_catalog(store, converter(family).read(store))


def _universal(data: bytes) -> None:
    _read(UNIVERSAL, {**base(UNIVERSAL), _ROOT: _signed(data, _sign_root)})


def _native(data: bytes) -> None:
    _read(NATIVE, {**base(NATIVE), "ucp.json": _signed(data, _sign_native)})


def _listed(path: str) -> Callable[[bytes], None]:
    """Reads `data` as the small file at `path`, which the root lists with a digest."""

    def read(data: bytes) -> None:
        files = dict(base(UNIVERSAL))
        root = json.loads(files[_ROOT])
        for row in root["attributes"]["ucp"]["files"]:
            if row["path"] == path:
                row["size"], row["crc32c"] = len(data), crc32c(data)
        _sign_root(root)
        _read(UNIVERSAL, {**files, path: data, _ROOT: json.dumps(root).encode()})

    return read


def _signed(data: bytes, sign: Callable[[Any], None]) -> bytes:
    """`data` with the digest that it should have, where it can have one."""
    try:
        document = json.loads(data)
        sign(document)
        return json.dumps(document).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return data


def _sign_root(root: Any) -> None:
    root["attributes"]["ucp"]["crc32c"] = root_digest(root)


def _sign_native(document: Any) -> None:
    document["crc32c"] = crc32c(canonical({key: value for key, value in document.items() if key != "crc32c"}))


def targets() -> list[Target]:
    universal, native = (sum(map(len, base(name).values())) for name in (UNIVERSAL, NATIVE))
    return [
        Target("universal", _universal, style="json", size=universal),
        Target("universal-state", _listed(_STATE), style="json", size=universal),
        Target("universal-digests", _listed(_DIGESTS), size=universal),
        Target("native", _native, style="json", size=native),
    ]
