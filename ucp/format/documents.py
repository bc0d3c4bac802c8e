"""Zarr v3 metadata documents (core spec, "Array metadata" and "Group metadata") and how JSON is written here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from crc32c import crc32c

from ucp.errors import CorruptError
from ucp.format.records import Array, Places, Record

Json = dict[str, Any]

_EXTENSIONS = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"})
"""Data types of the zarr-extensions registry that not every Zarr library reads."""

_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def canonical(value: object) -> bytes:
    """The one JSON text of `value` that digests are made of: members sorted, no spaces, UTF-8 unescaped."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def compact(value: object) -> bytes:
    """JSON as it is written: members in the order in which they were made."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parsed(data: bytes, *, where: str) -> Json:
    """The JSON object in `data`; CorruptError naming `where` for anything else.

    Among that: a member given twice, numbers that are not finite, and text that is no Unicode.
    """
    try:
        value = json.loads(data, object_pairs_hook=_members, parse_constant=_no_constant, parse_float=_finite)
        if b"\\ud" in data.lower():
            canonical(value)  # an escape for half a surrogate pair makes text that cannot be encoded
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: not valid JSON: {error}", hint="the file is damaged") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{where}: not a JSON object", hint="the file is damaged")
    return value


def _members(pairs: list[tuple[str, Any]]) -> Json:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is given twice")
    return members


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def group_document(attributes: Json) -> Json:
    """Metadata of a Zarr group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def array_document(record: Record, array: Array) -> Json:
    """Metadata of the Zarr array that `array` is; its first dim counts states."""
    grid = array.grid
    dims = record.tensor.dims if array is record.arrays[0] else None
    names = dims if dims is not None and len(dims) == len(grid.shape) else (None,) * len(grid.shape)
    sharding = {
        "chunk_shape": [1, *grid.chunk],
        "codecs": [_LITTLE],
        "index_codecs": [_LITTLE, {"name": "crc32c"}],
        "index_location": "end",
    }
    shard = [grid.states, *([grid.rows] if grid.shape else []), *(max(1, n) for n in grid.shape[1:])]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [grid.states, *grid.shape],
        "data_type": grid.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": _zero(grid.dtype),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"ucp": {"tensor": record.tensor.name, "states": list(array.states)}},
        "dimension_names": ["state", *names],
    }


def _zero(dtype: str) -> object:
    """Zero as the fill value of `dtype`, without a fraction: JSON numbers here are integers."""
    return {"bool": False, "complex64": [0, 0]}.get(dtype, 0)


def root_document(manifest: Json, documents: Mapping[str, Json], others: Json) -> Json:
    """The root group: manifest, its digest, `others`' attributes, and the consolidated metadata of `documents`.

    Consolidated metadata is left out where an array has an extension data type: libraries that do not know it could
    otherwise not even open the group.
    """
    root = group_document({"ucp": manifest, **others})
    if not any(document.get("data_type") in _EXTENSIONS for document in documents.values()):
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": dict(documents)}
    manifest["crc32c"] = root_digest(root)
    return root


def root_digest(root: Json) -> int:
    """crc32c of the canonical JSON of the root document without the member ``attributes.ucp.crc32c`` itself."""
    attributes = root["attributes"]
    manifest = {key: value for key, value in attributes["ucp"].items() if key != "crc32c"}
    return crc32c(canonical({**root, "attributes": {**attributes, "ucp": manifest}}))


def zarr_documents(records: Sequence[Record], places: Places) -> dict[str, Json]:
    """The documents below the root by folder: the group of tensors, then every array in manifest order.

    Arrays that share objects have none: a Zarr client would fill in zeros for what it does not find.
    """
    documents = {places.tensors: group_document({})}
    for record in records:
        for array in (array for array in record.arrays if not array.shares):
            documents[array.path] = array_document(record, array)
    return documents
