"""The format of torch.save before 1.6, still written with ``_use_new_zipfile_serialization=False``.

Five pickles in a row (magic number, version, system, the value, the storage keys), then for each key in order the
number of elements as a 64-bit integer and the elements (torch/serialization.py, ``_legacy_save``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from ucp.container.cursor import PickleTruncatedError
from ucp.container.machine import Machine
from ucp.container.tensors import slice_storage, storage_dtype, storage_itemsize, storage_leaf
from ucp.container.unpickle import unpickle_at
from ucp.container.values import Reference
from ucp.container.window import Window
from ucp.errors import CorruptError, FitError
from ucp.tree import Tree

_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = re.compile(rb"(?s)\x80.(?:\x95.{8})?\x8a\x0a" + re.escape(_MAGIC.to_bytes(10, "little")))
_VERSION = 1001
_FIRST_READ = 1 << 20
_MOST_PICKLE_BYTES = 1 << 30
_AGAIN = "get the file again from where it was written"


@dataclass(frozen=True, slots=True)
class _Header:
    """What comes before the storages: where the value's pickle starts and which keys follow it in which order."""

    value_start: int
    keys: list[str]
    end: int
    storages: dict[str, tuple[Reference, int]]


def is_legacy(head: bytes) -> bool:
    """Whether a file that starts with `head` is in the legacy format."""
    return _MAGIC_BYTES.match(head) is not None


def read_legacy(window: Window, path: str) -> Tree:
    """The tree of a legacy file, leaves in object `path`. CorruptError if damaged, FitError if big-endian."""
    data, header = _read_header(window)
    offsets = _place(window, header)

    def persistent(machine: Machine, key: Tree) -> Tree:
        return _storage_leaf(machine, key, path=path, offsets=offsets)

    return unpickle_at(data, header.value_start, where=window.where, persistent=persistent)[0]


def _read_header(window: Window) -> tuple[bytes, _Header]:
    """Read as much of the file as its pickles take, guessing how much that is."""
    length = min(window.size, _FIRST_READ)
    while True:
        data = window.bytes_at(0, length)
        try:
            return data, _parse_header(window, data)
        except PickleTruncatedError:
            if length == window.size or length >= _MOST_PICKLE_BYTES:
                raise
        length = min(window.size, length * 4)


def _parse_header(window: Window, data: bytes) -> _Header:
    where = window.where
    magic, position = unpickle_at(data, 0, where=where)
    version, position = unpickle_at(data, position, where=where)
    system, value_start = unpickle_at(data, position, where=where)
    if magic != _MAGIC or version != _VERSION or not isinstance(system, dict):
        raise CorruptError(f"{where}: the start of the file is damaged", hint=_AGAIN)
    if system.get("little_endian") is not True:
        raise FitError(
            f"{where}: written on a big-endian machine", hint="torch.load and torch.save it on a little-endian one"
        )
    storages: dict[str, tuple[Reference, int]] = {}

    def collect(machine: Machine, key: Tree) -> Tree:
        if isinstance(key, tuple) and len(key) == 4 and key[0] == "module":
            return key[1]
        kind, name, count, view = _storage_id(machine, key)
        storages.setdefault(name, (kind, count))
        leaf = storage_leaf(kind, object="", offset=0, count=count)
        return leaf if view is None else _part(machine, leaf, view)

    _, position = unpickle_at(data, value_start, where=where, persistent=collect)
    keys, end = unpickle_at(data, position, where=where)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise CorruptError(f"{where}: the list of storages differs from those the value uses", hint=_AGAIN)
    return _Header(value_start, [str(key) for key in keys], end, storages)


def _place(window: Window, header: _Header) -> dict[str, tuple[int, int]]:
    """(byte offset, bytes) of each storage; each is preceded by its number of elements, which is checked."""
    offsets: dict[str, tuple[int, int]] = {}
    position = header.end
    for key in header.keys:
        kind, count = header.storages[key]
        given = int.from_bytes(window.bytes_at(position, 8), "little")
        if given != count:
            raise CorruptError(
                f"{window.where}: storage {key} has {given} elements where {count} are expected", hint=_AGAIN
            )
        size = count * storage_itemsize(kind)
        offsets[key] = (position + 8, size)
        position += 8 + size
    if position != window.size:
        raise CorruptError(
            f"{window.where}: its tensors end at byte {position}, the file at {window.size}", hint=_AGAIN
        )
    return offsets


def _storage_leaf(machine: Machine, key: Tree, *, path: str, offsets: dict[str, tuple[int, int]]) -> Tree:
    if isinstance(key, tuple) and len(key) == 4 and key[0] == "module":
        return key[1]
    kind, name, count, view = _storage_id(machine, key)
    offset, size = offsets[name]
    if count * storage_itemsize(kind) > size:
        machine.fail(f"storage {name} has {size} bytes, too few for its elements")
    leaf = storage_leaf(kind, object=path, offset=offset, count=count)
    return leaf if view is None else _part(machine, leaf, view)


def _storage_id(machine: Machine, key: Tree) -> tuple[Reference, str, int, Tree]:
    """Take ``("storage", storage class, key, location, count, view)`` apart."""
    if not isinstance(key, tuple) or len(key) != 6 or key[0] != "storage" or storage_dtype(key[1]) is None:
        _no_storage(machine)
    _, kind, name, _, count, view = key
    if type(name) is not str or type(count) is not int or not 0 <= count < 1 << 60:
        _no_storage(machine)
    return kind, name, count, view


def _part(machine: Machine, leaf: Tree, view: Tree) -> Tree:
    """The part of a storage that ``(key, offset, count)`` describes."""
    if not isinstance(view, tuple) or len(view) != 3 or not all(type(number) is int for number in view[1:]):
        _no_storage(machine)
    part = slice_storage(leaf, view[1], view[2])
    return part if part is not None else _no_storage(machine)


def _no_storage(machine: Machine) -> NoReturn:
    machine.fail("a reference to something that is no storage")
