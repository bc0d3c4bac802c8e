"""Files that ``torch.load`` reads, written without torch.

The layout is that of torch's own writer (caffe2/serialize/inline_container.cc over miniz): every record stored,
its data at a multiple of 64 bytes by padding in the local header, sizes and CRC-32 in a data descriptor after the data
and in the directory at the end, which is always zip64.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from ucp.container.crc import combine
from ucp.container.pickler import Parts, Slot, Zeros, pickled
from ucp.errors import UsageError
from ucp.plan import BLOCK_BYTES, Digests
from ucp.tree import TensorLeaf, Tree

_ALIGNMENT = 64
_WIDE = 0xFFFFFFFF
_BLANK = bytes(1 << 20)
_RECORDS = ((".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little"))
_VERSION = ("version", b"3\n")


@dataclass(frozen=True, slots=True)
class _Record:
    """A file of the zip whose local header is at byte `header`: bytes known before, or parts that a task writes."""

    name: bytes
    header: int
    size: int
    data: bytes | Parts

    def placed(self) -> Iterator[tuple[int, int | Zeros]]:
        """Each part with the byte at which it starts; nothing where the data is known."""
        at = self.start
        for part in () if isinstance(self.data, bytes) else self.data:
            yield at, part
            at += _length(part)

    def crc32(self, sections: Iterator[int]) -> int:
        """CRC-32 of the data, from those of its sections, which are taken from `sections`."""
        if isinstance(self.data, bytes):
            return zlib.crc32(self.data)
        value = 0
        for part in self.data:
            other = _zeros_crc32(part.nbytes) if isinstance(part, Zeros) else next(sections)
            value = combine("crc32", value, other, _length(part)) if value else other
        return value

    @property
    def wide(self) -> bool:
        """Whether size or position need 64 bits."""
        return max(self.header, self.size) >= _WIDE

    @property
    def start(self) -> int:
        """Byte of the first byte of data."""
        head = self.header + 30 + len(self.name) + len(self.wide_extra()) + 4
        return -(-head // _ALIGNMENT) * _ALIGNMENT

    @property
    def stop(self) -> int:
        """Byte after the data descriptor; miniz writes none after no data."""
        return self.start + self.size + ((24 if self.wide else 16) if self.size else 0)

    @property
    def flags(self) -> int:
        """General purpose bits: the name is UTF-8; sizes and CRC-32 come after the data."""
        return 0x0808 if self.size else 0x0800

    def local(self) -> bytes:
        """The local header, padded up to the data."""
        extra = self.wide_extra()
        padding = self.start - self.header - 30 - len(self.name) - len(extra) - 4
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        fields = (45 if self.wide else 0, self.flags, 0, 0, 0, 0, 0, 0, len(self.name), len(extra))
        return struct.pack("<4s5H3L2H", b"PK\x03\x04", *fields) + self.name + extra

    def descriptor(self, crc32: int) -> bytes:
        """What follows the data."""
        form = "<4sLQQ" if self.wide else "<4s3L"
        return struct.pack(form, b"PK\x07\x08", crc32, self.size, self.size) if self.size else b""

    def central(self, crc32: int) -> bytes:
        """The entry in the directory."""
        extra, need = self.wide_extra(), 45 if self.wide else 0
        size, header = min(self.size, _WIDE), min(self.header, _WIDE)
        fields = (need, need, self.flags, 0, 0, 0, crc32, size, size, len(self.name), len(extra), 0, 0, 0, 0, header)
        return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields) + self.name + extra

    def wide_extra(self) -> bytes:
        """The zip64 extra field: what does not fit 32 bits."""
        numbers = [self.size, self.size] if self.size >= _WIDE else []
        numbers += [self.header] if self.header >= _WIDE else []
        return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


@dataclass(frozen=True, slots=True)
class TorchFrame:
    """A `ucp.plan.Frame`: a torch file around tensors whose bytes are the sections of a task.

    Make one with `TorchFrame.of`; then section i of the task starts at byte ``offsets[i]`` and the task's object has
    `size` bytes. `storages` are, in order, the bytes of a tensor that the tree itself holds or the parts of a slot.
    """

    archive: str
    pickle: bytes
    storages: tuple[bytes | Parts, ...]
    block_bytes: int = BLOCK_BYTES

    @classmethod
    def of(
        cls, tree: Tree, *, archive: str = "archive", classes: Collection[str] = (), block_bytes: int = BLOCK_BYTES
    ) -> TorchFrame:
        """The frame of `tree`, whose tensors are each a `Slot` or a leaf with inline bytes.

        Slots must come up in the tree in order of their index, from 0. `archive` is the name of the folder inside the
        zip; `classes` are the ``module.name`` of what the tree may refer to beside plain values and tensors.
        UsageError for a tree that cannot be written.
        """
        if not archive or "/" in archive:
            raise UsageError(f"{archive!r} cannot name the folder in a torch file")
        storages = _Storages()
        pickle = pickled(tree, storage=storages.key, classes=classes)
        return cls(archive, pickle, tuple(storages.found), block_bytes)

    @property
    def needs_crc32(self) -> bool:
        """The zip directory holds the CRC-32 of each storage."""
        return True

    @property
    def offsets(self) -> tuple[int, ...]:
        """Byte at which each section starts."""
        return tuple(at for record in self._records() for at, part in record.placed() if isinstance(part, int))

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        records = self._records()
        offset, end = _suffix(records, [0] * len(records))
        return offset + len(end)

    def literals(self) -> Iterable[tuple[int, bytes]]:
        """Everything before the suffix that is not of a section.

        The CRC-32 in the data descriptor after a section is not known here and is 0; readers of stored records take it
        from the directory, where it is right.
        """
        *before, version = self._records()
        for record in before:
            yield record.header, record.local()
            if isinstance(record.data, bytes):
                if record.data:
                    yield record.start, record.data + record.descriptor(zlib.crc32(record.data))
                continue
            for at, part in record.placed():
                if isinstance(part, Zeros):
                    yield from _zeros(at, part.nbytes)
            if record.size and record.stop != version.header:
                yield record.start + record.size, record.descriptor(0)

    def suffix(self, digests: Digests) -> tuple[int, bytes]:
        """What follows the last storage: its descriptor, the version record and the directory."""
        records, sections = self._records(), iter(digests.crc32)
        return _suffix(records, [record.crc32(sections) for record in records])

    def _records(self) -> list[_Record]:
        """All files of the zip in order, the version last."""
        contents: list[tuple[str, bytes | Parts]] = [("data.pkl", self.pickle), *_RECORDS]
        contents += [(f"data/{key}", storage) for key, storage in enumerate(self.storages)]
        contents.append(_VERSION)
        records: list[_Record] = []
        for name, content in contents:
            header = records[-1].stop if records else 0
            size = len(content) if isinstance(content, bytes) else sum(map(_length, content))
            records.append(_Record(f"{self.archive}/{name}".encode(), header, size, content))
        return records


def _suffix(records: list[_Record], sums: list[int]) -> tuple[int, bytes]:
    """The end of the file, from the CRC-32 of every record."""
    *before, version = records
    begin, last = version.header, b""
    if not isinstance(before[-1].data, bytes) and before[-1].size:
        last = before[-1].descriptor(sums[-2])
        begin -= len(last)
    assert isinstance(version.data, bytes)
    tail = version.local() + version.data + version.descriptor(sums[-1])
    central = b"".join(record.central(crc32) for record, crc32 in zip(records, sums, strict=True))
    return begin, last + tail + central + _end(len(sums), version.stop, len(central))


def _length(part: int | Zeros) -> int:
    return part.nbytes if isinstance(part, Zeros) else part


def _zeros(offset: int, length: int) -> Iterator[tuple[int, bytes]]:
    """Literals for `length` zeros; large ones share their bytes, however many there are."""
    for at in range(0, length, len(_BLANK)):
        yield offset + at, _BLANK if length - at >= len(_BLANK) else bytes(length - at)


def _zeros_crc32(length: int) -> int:
    """CRC-32 of `length` zero bytes, by doubling."""
    value, run, size = 0, zlib.crc32(b"\0"), 1
    while size <= length:
        if length & size:
            value = combine("crc32", value, run, size)
        run, size = combine("crc32", run, run, size), 2 * size
    return value


class _Storages:
    """Numbers storages in the order in which the pickle comes upon them, which is torch's order in the file."""

    def __init__(self) -> None:
        self.found: list[bytes | Parts] = []
        self._slots: list[tuple[str, Slot]] = []

    def key(self, tensor: Slot | TensorLeaf) -> str:
        """The storage key of a tensor."""
        key = str(len(self.found))
        if isinstance(tensor, TensorLeaf):
            assert tensor.inline is not None
            self.found.append(tensor.inline)
            return key
        if tensor.index < len(self._slots):
            return self._again(tensor)
        if tensor.index > len(self._slots):
            raise UsageError(f"slot {tensor.index} comes up where slot {len(self._slots)} should")
        if sum(map(_length, tensor.made_of)) != tensor.spec.nbytes:
            raise UsageError(f"slot {tensor.index} has parts of another size than its {tensor.spec.nbytes} bytes")
        self._slots.append((key, tensor))
        self.found.append(tensor.made_of)
        return key

    def _again(self, tensor: Slot) -> str:
        key, first = self._slots[tensor.index]
        if tensor.index < 0 or (first.spec.size, first.spec.dtype) != (tensor.spec.size, tensor.spec.dtype):
            raise UsageError(f"slot {tensor.index} has two sizes or dtypes")
        return key


def dumps(tree: Tree, *, archive: str = "archive", classes: Collection[str] = ()) -> bytes:
    """A whole torch file of a tree whose tensors all hold their bytes inline. UsageError as `TorchFrame.of`."""
    frame = TorchFrame.of(tree, archive=archive, classes=classes)
    if not all(isinstance(storage, bytes) for storage in frame.storages):
        raise UsageError("a tree with slots is written by a task, not in memory")
    _, end = frame.suffix(Digests(()))
    return b"".join(data for _, data in frame.literals()) + end


def _end(count: int, start: int, length: int) -> bytes:
    """The end records of zip64 and zip for a directory of `count` entries and `length` bytes from byte `start`."""
    wide = (b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, start)
    narrow = (min(count, 0xFFFF), min(count, 0xFFFF), min(length, _WIDE), min(start, _WIDE))
    return (
        struct.pack("<4sQ2H2L4Q", *wide)
        + struct.pack("<4sLQL", b"PK\x06\x07", 0, start + length, 1)
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *narrow, 0)
    )


__all__ = ["Slot", "TorchFrame", "Zeros", "dumps"]
