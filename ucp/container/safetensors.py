"""The header of a safetensors file: names, dtypes, shapes and where the bytes lie (safetensors README, "Format").

A file is the header's length as a 64-bit integer, the header as JSON, and the data. Every byte of the data belongs to
one tensor, in order and without holes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ucp.errors import CorruptError, FitError
from ucp.layout.dtypes import FROM_SAFETENSORS
from ucp.plan import Extent, TensorSpec
from ucp.store import Entry, Store

_MOST_HEADER_BYTES = 100_000_000
_FIRST_READ = 1 << 16
_AGAIN = "get the file again from where it was written"


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A safetensors file: extents by tensor name, in order of position, byte offsets absolute; and its `metadata`."""

    tensors: Mapping[str, Extent]
    metadata: Mapping[str, str]
    entry: Entry

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        extent = self.tensors[name]
        return TensorSpec(extent.shape, extent.dtype)


def read_header(store: Store, path: str) -> SafetensorsFile:
    """Read the header of a safetensors file and check it against the file's size.

    NotFoundError if there is no such object, CorruptError for a damaged or lying header, FitError for a dtype that ucp
    does not know.
    """
    entry = store.entry(path)
    where = f"{store.url}/{path}"
    raw, data_start = _read_raw(store, entry, where)
    header = _parse(raw, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(where, "its metadata is not text")
    found = [_tensor(where, path, name, item, data_start) for name, item in header.items()]
    found.sort(key=lambda named: (named[1].offset, named[1].offset + named[1].nbytes))
    position = data_start
    for name, extent in found:
        if extent.offset != position:
            _damaged(where, f"{name} starts at byte {extent.offset} and not at {position}, where the one before ends")
        position += extent.nbytes
    if position != entry.size:
        _damaged(where, f"its tensors end at byte {position}, the file at {entry.size}")
    return SafetensorsFile(dict(found), metadata, entry)


def _read_raw(store: Store, entry: Entry, where: str) -> tuple[bytes, int]:
    """The JSON and the byte at which the data starts, in one read for most files."""
    first = store.read(entry.path, 0, min(entry.size, _FIRST_READ))
    if len(first) < 8:
        _damaged(where, f"it has only {len(first)} bytes")
    length = int.from_bytes(first[:8], "little")
    if length > min(_MOST_HEADER_BYTES, entry.size - 8):
        _damaged(where, f"its header claims {length} bytes in a file of {entry.size}")
    if length + 8 > len(first):
        return store.read(entry.path, 8, length), 8 + length
    return first[8 : 8 + length], 8 + length


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _error(where, "its header is not JSON") from error
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        _damaged(where, "its header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name twice in one object")
    return made


def _tensor(where: str, path: str, name: str, item: Any, data_start: int) -> tuple[str, Extent]:
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        _damaged(where, f"{name} is not described by dtype, shape and data_offsets")
    code, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not _naturals(shape) or len(shape) > 64 or not _naturals(offsets) or len(offsets) != 2:
        _damaged(where, f"{name} has a shape or data_offsets that are not natural numbers")
    if not isinstance(code, str) or code not in FROM_SAFETENSORS:
        raise FitError(f"{where}: {name} has dtype {code!r:.40}", hint=f"known: {' '.join(FROM_SAFETENSORS)}")
    extent = Extent.contiguous(path, data_start + offsets[0], tuple(shape), FROM_SAFETENSORS[code])
    if extent.nbytes != offsets[1] - offsets[0]:
        _damaged(where, f"{name} of shape {shape} has {offsets[1] - offsets[0]} bytes and not {extent.nbytes}")
    return name, extent


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _error(where: str, problem: str) -> CorruptError:
    return CorruptError(f"{where}: no sound safetensors file: {problem}", hint=_AGAIN)


def _damaged(where: str, problem: str) -> NoReturn:
    raise _error(where, problem)
