"""``.metadata`` as torch pickles it, written without torch.

The classes are those of torch/distributed/checkpoint/metadata.py and filesystem.py (``_StorageInfo``), by name, with
the attributes that torch 2.6 to 2.13 give them; protocol 2, which every reader takes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ucp.layout import Shape

VERSION = "1.0.0"
"""``CURRENT_DCP_VERSION`` since it exists."""

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"

Plain = str | int | bool | None | tuple["Plain", ...] | list["Plain"] | dict[str, "Plain"]
"""What a pickled path or attribute may be made of."""


class Place(NamedTuple):
    """Bytes ``[offset, offset + length)`` of the object at `path`, which is relative to the folder of ``.metadata``."""

    path: str
    offset: int
    length: int


class TensorRecord(NamedTuple):
    """A tensor under `key`; of each chunk its offsets, sizes and place. `dtype` is torch's name without ``torch.``."""

    key: str
    shape: Shape
    dtype: str
    chunks: tuple[tuple[Shape, Shape, Place], ...]


class BlobRecord(NamedTuple):
    """A pickled object under `key`."""

    key: str
    place: Place


def describe(
    records: Iterable[TensorRecord | BlobRecord],
    *,
    planner: Mapping[str, tuple[str | int, ...]] | None,
    extra: Mapping[str, Plain] | None = None,
) -> bytes:
    """The bytes of ``.metadata``.

    `planner` gives the path of each key in the nested state dict, None where nothing was flattened; `extra` are further
    attributes.
    """
    held = list(records)
    pickle = _Pickle()
    pickle.begin(_METADATA, "Metadata")
    pickle.plain("state_dict_metadata")
    _records(pickle, held)
    pickle.plain("planner_data")
    pickle.plain(None if planner is None else dict(planner))
    pickle.plain("storage_data")
    _places(pickle, held)
    for key, value in ({"storage_meta": None, "version": VERSION} | dict(extra or {})).items():
        pickle.plain(key)
        pickle.plain(value)
    pickle.end()
    return bytes(pickle.out + b".")


def _records(pickle: _Pickle, records: Iterable[TensorRecord | BlobRecord]) -> None:
    """``state_dict_metadata``: what is stored under each key."""
    pickle.out += b"}("
    for record in records:
        pickle.plain(record.key)
        if isinstance(record, BlobRecord):
            pickle.begin(_METADATA, "BytesStorageMetadata")
            pickle.end()
        else:
            _tensor(pickle, record)
    pickle.out += b"u"


def _tensor(pickle: _Pickle, record: TensorRecord) -> None:
    pickle.begin(_METADATA, "TensorStorageMetadata")
    pickle.plain("properties")
    _properties(pickle, record.dtype)
    pickle.plain("size")
    pickle.size(record.shape)
    pickle.plain("chunks")
    pickle.out += b"]("
    for offsets, sizes, _ in record.chunks:
        pickle.begin(_METADATA, "ChunkStorageMetadata")
        pickle.plain("offsets")
        pickle.size(offsets)
        pickle.plain("sizes")
        pickle.size(sizes)
        pickle.end()
    pickle.out += b"e"
    pickle.end()


def _properties(pickle: _Pickle, dtype: str) -> None:
    """``TensorProperties``: (dtype, layout, requires_grad, memory format, pin_memory) given to ``__setstate__``."""
    if pickle.known(("properties", dtype)):
        return
    pickle.named(_METADATA, "TensorProperties")
    pickle.out += b")\x81("
    pickle.named("torch", dtype)
    pickle.named("torch.serialization", "_get_layout")
    pickle.plain(("torch.strided",))
    pickle.out += b"R\x89"
    pickle.named(_METADATA, "_MEM_FORMAT_ENCODING")
    pickle.plain((0,))
    pickle.out += b"R\x89tb"
    pickle.remember(("properties", dtype))


def _places(pickle: _Pickle, records: Iterable[TensorRecord | BlobRecord]) -> None:
    """``storage_data``: ``MetadataIndex(fqn, offset, index)`` to ``_StorageInfo(relative_path, offset, length)``."""
    pickle.out += b"}("
    for record in records:
        if isinstance(record, BlobRecord):
            _place(pickle, record.key, None, None, record.place)
            continue
        for index, (offsets, _, place) in enumerate(record.chunks):
            _place(pickle, record.key, offsets, index, place)
    pickle.out += b"u"


def _place(pickle: _Pickle, key: str, offsets: Shape | None, index: int | None, place: Place) -> None:
    pickle.begin(_METADATA, "MetadataIndex")
    pickle.pairs(fqn=key, index=index)
    if offsets is not None:
        pickle.plain("offset")
        pickle.size(offsets)
    pickle.end()
    pickle.begin(_FILESYSTEM, "_StorageInfo")
    pickle.pairs(relative_path=place.path, offset=place.offset, length=place.length)
    pickle.end()


class _Pickle:
    """Writes opcodes. Strings, classes and sizes are memoized by value."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self._memo: dict[object, int] = {}

    def known(self, key: object) -> bool:
        """Write a reference to `key` if it was written before."""
        index = self._memo.get(key)
        if index is None:
            return False
        self.out += b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)
        return True

    def remember(self, key: object) -> None:
        """Name what was just written."""
        index = self._memo[key] = len(self._memo)
        self.out += b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index)

    def named(self, module: str, name: str) -> None:
        """A class, function or constant."""
        if not self.known((module, name)):
            self.out += f"c{module}\n{name}\n".encode()
            self.remember((module, name))

    def begin(self, module: str, name: str) -> None:
        """An object whose attributes follow, each as a name and a value, up to `end`."""
        self.named(module, name)
        self.out += b")\x81}("

    def end(self) -> None:
        """Give the object what was written since `begin`."""
        self.out += b"ub"

    def pairs(self, **attributes: Plain) -> None:
        """Attributes of an object that was begun."""
        for name, value in attributes.items():
            self.plain(name)
            self.plain(value)

    def size(self, shape: Shape) -> None:
        """A ``torch.Size``."""
        if not self.known(("size", shape)):
            self.named("torch", "Size")
            self.plain((tuple(shape),))
            self.out += b"R"
            self.remember(("size", shape))

    def plain(self, value: Plain) -> None:
        """Plain data."""
        if value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self.out += _integer(value)
        elif isinstance(value, str):
            self._text(value)
        elif isinstance(value, dict):
            self.out += b"}("
            for key, item in value.items():
                self.plain(key)
                self.plain(item)
            self.out += b"u"
        else:
            self.out += b"("
            for item in value:
                self.plain(item)
            self.out += b"t" if isinstance(value, tuple) else b"l"

    def _text(self, text: str) -> None:
        if not self.known(text):
            raw = text.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(raw)) + raw
            self.remember(text)


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw
