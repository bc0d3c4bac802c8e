"""The directory of a zip file, read with few small reads (PKWARE APPNOTE.TXT, sections 4.3 and 4.5).

Only what torch.save writes is let through (caffe2/serialize/inline_container.cc): entries that each have bytes of their
own, and a directory without comment at the very end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ucp.container.window import Window
from ucp.errors import CorruptError, FitError

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")

LOCAL_SIGNATURE = b"PK\x03\x04"
_MOST_DIRECTORY_BYTES = 1 << 28
_MOST_ENTRIES = 1 << 20
_AGAIN = "get the file again from where it was written"


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One file of a zip: `header` is the byte of its local header, `flags` its general purpose bits.

    `size` are its bytes in the zip, as they are if `method` is 0.
    """

    name: str
    header: int
    size: int
    crc32: int
    flags: int
    method: int

    @property
    def raw_name(self) -> bytes:
        """The name as in the file."""
        return self.name.encode("utf-8", "surrogateescape")

    @property
    def descriptor(self) -> int:
        """Bytes of the data descriptor after the data, as miniz writes it."""
        if not self.flags & 0x08:
            return 0
        return 24 if max(self.header, self.size) >= 0xFFFFFFFF else 16


@dataclass(frozen=True, slots=True)
class ZipDirectory:
    """All entries by name, in order of position, and the byte at which the directory starts."""

    entries: dict[str, ZipEntry]
    start: int

    def ends(self) -> dict[str, int]:
        """For each entry the byte at which the next one, or the directory, starts."""
        starts = [entry.header for entry in self.entries.values()] + [self.start]
        return {name: end for name, (_, end) in zip(self.entries, pairwise(starts), strict=True)}


def read_directory(window: Window) -> ZipDirectory:
    """The directory of a zip file. CorruptError for a truncated or contradictory one."""
    count, offset, length, end = _read_end(window)
    if (
        offset + length != end
        or length > _MOST_DIRECTORY_BYTES
        or count * _ENTRY.size > length
        or count > _MOST_ENTRIES
    ):
        raise CorruptError(f"{window.where}: the zip directory is not where the file says", hint=_AGAIN)
    entries = sorted(_parse(window, window.bytes_at(offset, length), count), key=lambda entry: entry.header)
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) != len(entries):
        raise CorruptError(f"{window.where}: two zip entries have the same name", hint="do not trust this file")
    directory = ZipDirectory(by_name, offset)
    for name, stop in directory.ends().items():
        entry = by_name[name]
        if entry.header + LOCAL.size + len(entry.raw_name) + entry.size > stop:
            raise CorruptError(f"{window.where}: zip entry {name!r} overlaps the next one", hint=_AGAIN)
    return directory


def require_stored(directory: ZipDirectory, *, where: str) -> None:
    """FitError for entries whose bytes are not in the file as they are."""
    for name, entry in directory.entries.items():
        if entry.flags & 0x2041:
            raise FitError(f"{where}: zip entry {name!r} is encrypted", hint="decrypt the file first")
        if entry.method:
            raise FitError(
                f"{where}: zip entry {name!r} is compressed, which torch.save never does",
                hint="write the file again with torch.save",
            )


def data_offset(window: Window, entry: ZipEntry, stop: int, *, alignment: int) -> int:
    """Byte at which the data of `entry` starts, where the next entry starts at `stop`.

    torch pads the local header so that the data is aligned; where counting back from the next entry leads to just that
    byte and the header is not already in memory, it need not be read.
    """
    head = entry.header + LOCAL.size + len(entry.raw_name)
    guess = stop - entry.descriptor - entry.size if entry.size else -1
    if guess >= head + 4 and guess % alignment == 0 and guess - head < alignment + 32 and not window.has(entry.header):
        return guess
    return _read_local(window, entry, stop)


def _read_local(window: Window, entry: ZipEntry, stop: int) -> int:
    raw = window.bytes_at(entry.header, LOCAL.size + len(entry.raw_name))
    signature, _, flags, method, _, _, _, stored, size, name_length, extra_length = LOCAL.unpack_from(raw)
    if signature != LOCAL_SIGNATURE or name_length != len(entry.raw_name) or raw[LOCAL.size :] != entry.raw_name:
        raise CorruptError(f"{window.where}: zip entry {entry.name!r} is not where the directory says", hint=_AGAIN)
    if method or flags & 0x01 or any(given not in (0, 0xFFFFFFFF, entry.size) for given in (stored, size)):
        raise CorruptError(f"{window.where}: zip entry {entry.name!r} contradicts the directory", hint=_AGAIN)
    start: int = entry.header + LOCAL.size + name_length + extra_length
    if start + entry.size > stop:
        raise CorruptError(f"{window.where}: zip entry {entry.name!r} overlaps the next one", hint=_AGAIN)
    return start


def _read_end(window: Window) -> tuple[int, int, int, int]:
    """(entries, offset, length, byte after) of the directory, from the end records of zip and zip64."""
    place = window.size - _END.size
    if place < 0:
        raise _truncated(window)
    signature, disk, first, here, count, length, offset, comment = _END.unpack(window.bytes_at(place, _END.size))
    if signature != b"PK\x05\x06" or comment:
        raise _truncated(window)
    if disk or first or here != count:
        raise CorruptError(f"{window.where}: the end of the zip directory is damaged", hint=_AGAIN)
    locator = place - _LOCATOR64.size
    if locator < 0 or window.bytes_at(locator, 4) != b"PK\x06\x07":
        return count, offset, length, place
    wide = _read_end64(window, locator)
    narrow = zip((count, offset, length), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), wide, strict=False)
    if any(small not in (most, large) for small, most, large in narrow):
        raise CorruptError(f"{window.where}: the two ends of the zip directory differ", hint=_AGAIN)
    return wide


def _read_end64(window: Window, locator: int) -> tuple[int, int, int, int]:
    _, disk, end, disks = _LOCATOR64.unpack(window.bytes_at(locator, _LOCATOR64.size))
    if disk or disks != 1 or end != locator - _END64.size:
        raise CorruptError(f"{window.where}: the end of the zip directory is damaged", hint=_AGAIN)
    record = _END64.unpack(window.bytes_at(end, _END64.size))
    signature, size, _, _, here_disk, first, here, count, length, offset = record
    if signature != b"PK\x06\x06" or size != _END64.size - 12 or here_disk or first or here != count:
        raise CorruptError(f"{window.where}: the end of the zip directory is damaged", hint=_AGAIN)
    return count, offset, length, end


def _parse(window: Window, raw: bytes, count: int) -> Iterator[ZipEntry]:
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(raw):
            raise CorruptError(f"{window.where}: the zip directory is damaged", hint=_AGAIN)
        fields = _ENTRY.unpack_from(raw, position)
        name_end = position + _ENTRY.size + fields[10]
        extra_end = name_end + fields[11]
        position = extra_end + fields[12]
        if fields[0] != b"PK\x01\x02" or position > len(raw):
            raise CorruptError(f"{window.where}: the zip directory is damaged", hint=_AGAIN)
        name = raw[name_end - fields[10] : name_end].decode("utf-8", "surrogateescape")
        yield _entry(window, name, fields, raw[name_end:extra_end])
    if position != len(raw):
        raise CorruptError(f"{window.where}: the zip directory has more in it than it says", hint=_AGAIN)


def _entry(window: Window, name: str, fields: tuple[int, ...], extra: bytes) -> ZipEntry:
    flags, method, crc, stored, size, header = fields[3], fields[4], fields[7], fields[8], fields[9], fields[16]
    size, stored, header = _widen(window, name, extra, (size, stored, header))
    if fields[13] or (stored != size and not method):
        raise CorruptError(f"{window.where}: zip entry {name!r} contradicts itself", hint=_AGAIN)
    return ZipEntry(name, header, stored, crc, flags, method)


def _widen(window: Window, name: str, extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """Replace each value that does not fit 32 bits by its 64-bit one from the zip64 extra field (0x0001)."""
    if 0xFFFFFFFF not in values:
        return values
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        wide = extra[position + 4 : position + 4 + length]
        if kind == 1 and len(wide) >= 8 * values.count(0xFFFFFFFF):
            numbers = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
            size, stored, header = (next(numbers) if value == 0xFFFFFFFF else value for value in values)
            return size, stored, header
        position += 4 + length
    raise CorruptError(f"{window.where}: zip entry {name!r} lacks its size", hint=_AGAIN)


def _truncated(window: Window) -> CorruptError:
    return CorruptError(
        f"{window.where}: the zip file is truncated or damaged: there is no directory at its end ({window.size} bytes)",
        hint="the save was cut short, or the copy of it: get the file again from where it was written",
    )
