"""Files of ``torch.save``, read lazily: the pickle becomes a tree whose tensors say where their bytes lie.

Sources of the format: torch/serialization.py (``_load``, ``_legacy_load``) and caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from ucp.catalog import Checksum
from ucp.container.leaves import leaf_bytes, leaf_numpy, leaf_scalar, with_bytes
from ucp.container.legacy import is_legacy, read_legacy
from ucp.container.machine import Machine
from ucp.container.rebind import Rebind
from ucp.container.tensors import storage_dtype, storage_itemsize, storage_leaf
from ucp.container.unpickle import unpickle
from ucp.container.window import Window
from ucp.container.zipdir import LOCAL_SIGNATURE, ZipDirectory, ZipEntry, data_offset, read_directory, require_stored
from ucp.errors import CorruptError, FitError
from ucp.store import Entry, Store
from ucp.tree import Tree

_AGAIN = "get the file again from where it was written"
_MOST_PICKLE_BYTES = 1 << 30
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A file of torch.save. Extents of the leaves of `root` lie in the object at ``entry.path``, byte offsets absolute.

    `checksums` are the CRC-32 that the file keeps of its storages.
    """

    root: Tree
    checksums: tuple[Checksum, ...]
    entry: Entry


def read_torch_file(store: Store, path: str) -> TorchFile:
    """Read all of a ``torch.save`` file but its tensors; both the zip format and the one before torch 1.6.

    NotFoundError if there is no such object, CorruptError if it is damaged or no such file, UnsafeError if its pickle
    asks for what only an attack does, FitError if it is sound but of a kind that cannot be read lazily.
    """
    return TorchFiles(store).read(path)


class TorchFiles:
    """Reads files many of which hold the same pickle, as the files of ranks do: each such pickle is run once.

    What their trees have in common, everything but tensors, is shared between them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[bytes, list[tuple[Tree, dict[str, tuple[int, int]]]]] = {}

    def read(self, path: str) -> TorchFile:
        """See `read_torch_file`."""
        entry = self._store.entry(path)
        window = Window(self._store, path, entry.size)
        head = window.bytes_at(0, min(entry.size, 512))
        if head.startswith(LOCAL_SIGNATURE):
            archive = _Archive(window, entry.path)
            return TorchFile(self._tree(archive), tuple(archive.checksums()), entry)
        if is_legacy(head):
            return TorchFile(read_legacy(window, path), (), entry)
        raise _foreign(window, head)

    def read_part(self, window: Window, path: str) -> tuple[Tree, tuple[Checksum, ...]]:
        """Tree and checksums of a ``torch.save`` zip that is a part of the object at `path`, which `window` shows.

        Offsets are those in the object. Errors as in `read_torch_file`.
        """
        head = window.bytes_at(0, min(window.size, 512))
        if not head.startswith(LOCAL_SIGNATURE):
            raise _foreign(window, head)
        archive = _Archive(window, path)
        return self._tree(archive), tuple(archive.checksums())

    def _tree(self, archive: _Archive) -> Tree:
        pickle = archive.read("data.pkl", most=_MOST_PICKLE_BYTES)
        known = self._known.setdefault(pickle, [])
        for root, storages in known:
            if all(archive.size(name) == size for name, (_, size) in storages.items()):
                filled = {name: offset for name, (offset, size) in storages.items() if size}
                return Rebind(archive.path, filled, {name: archive.offset(name) for name in filled}).tree(root)
        root = unpickle(pickle, where=archive.window.where, persistent=archive.persistent)
        known.append((root, archive.storages))
        return root


class _Archive:
    """The entries of a torch.save zip, by their name below the archive's own."""

    def __init__(self, window: Window, path: str) -> None:
        self.window = window
        self.path = path
        self.directory = read_directory(window)
        self.ends = self.directory.ends()
        self.prefix = _prefix(self.directory, window.where)
        require_stored(self.directory, where=window.where)
        self._keep_small_records()
        self.alignment = self._alignment()
        self.storages: dict[str, tuple[int, int]] = {}
        if self.has("byteorder") and (order := self.read("byteorder", most=16)) != b"little":
            raise _big_endian(window.where) if order == b"big" else self._damaged("byteorder")

    def has(self, name: str) -> bool:
        """Whether there is a record `name`."""
        return self.prefix + name in self.directory.entries

    def read(self, name: str, *, most: int) -> bytes:
        """The bytes of a small record, checked against its CRC-32."""
        entry = self.directory.entries[self.prefix + name]
        if entry.size > most:
            raise self._damaged(name)
        start = data_offset(self.window, entry, self.ends[entry.name], alignment=_ALIGNMENT)
        data = self.window.bytes_at(start, entry.size)
        if zlib.crc32(data) != entry.crc32 and entry.crc32:
            raise self._damaged(name)
        return data

    def persistent(self, machine: Machine, key: Tree) -> Tree:
        """The leaf of ``("storage", storage class, key, location, count)``."""
        if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage" or storage_dtype(key[1]) is None:
            machine.fail("a reference to something that is no storage")
        _, kind, name, _, count = key
        if type(name) is not str or type(count) is not int or count < 0:
            machine.fail("a reference to a storage without name or size")
        offset, size = self._storage(name)
        width = storage_itemsize(kind)
        if not count * width <= size < (count + 1) * width:
            raise CorruptError(
                f"{self.window.where}: storage {name} has {size} bytes and not {count} of {width}", hint=_AGAIN
            )
        return storage_leaf(kind, object=self.path, offset=offset, count=count)

    def checksums(self) -> list[Checksum]:
        """CRC-32 of each storage; torch writes 0 where it was told to compute none."""
        found = []
        for entry in self.directory.entries.values():
            if entry.name.startswith(f"{self.prefix}data/") and entry.size and entry.crc32:
                offset, size = self._storage(entry.name.removeprefix(f"{self.prefix}data/"))
                found.append(Checksum(self.path, offset, size, "crc32", entry.crc32))
        return found

    def size(self, key: str) -> int:
        """Bytes of a storage, -1 if there is none."""
        entry = self.directory.entries.get(f"{self.prefix}data/{key}")
        return -1 if entry is None else entry.size

    def offset(self, key: str) -> int:
        """The byte at which a storage starts."""
        return self._storage(key)[0]

    def _storage(self, key: str) -> tuple[int, int]:
        if key not in self.storages:
            entry = self._entry(f"data/{key}")
            offset = data_offset(self.window, entry, self.ends[entry.name], alignment=self.alignment)
            self.storages[key] = (self.window.start + offset, entry.size)
        return self.storages[key]

    def _entry(self, name: str) -> ZipEntry:
        entry = self.directory.entries.get(self.prefix + name)
        if entry is None:
            raise CorruptError(f"{self.window.where}: storage {name!r:.80} is not in the file", hint=_AGAIN)
        return entry

    def _keep_small_records(self) -> None:
        """Read in one go what torch writes before the storages: data.pkl, byteorder and their like."""
        entry = self.directory.entries[f"{self.prefix}data.pkl"]
        if self.window.has(entry.header) or entry.size > _MOST_PICKLE_BYTES:
            return
        storages = [e.header for e in self.directory.entries.values() if e.name.startswith(f"{self.prefix}data/")]
        stop = min((start for start in storages if start > entry.header), default=self.directory.start)
        self.window.keep(entry.header, min(stop, self.ends[entry.name] + 1024))

    def _alignment(self) -> int:
        if not self.has(".storage_alignment"):
            return _ALIGNMENT
        text = self.read(".storage_alignment", most=16)
        if not text.isdigit() or not 0 < int(text) <= 1 << 30:
            raise self._damaged(".storage_alignment")
        return int(text)

    def _damaged(self, name: str) -> CorruptError:
        return CorruptError(f"{self.window.where}: {name} in it is damaged", hint=_AGAIN)


def _prefix(directory: ZipDirectory, where: str) -> str:
    """``<archive name>/``, which torch puts before the name of each record."""
    found = [name for name in directory.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise CorruptError(f"{where}: a zip file, but not one of torch.save: there is no data.pkl in it", hint=_AGAIN)
    prefix = found[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in directory.entries:
        raise FitError(
            f"{where}: a TorchScript program, not a checkpoint",
            hint="torch.jit.load it and torch.save the state_dict of the module",
        )
    return prefix


def _big_endian(where: str) -> FitError:
    return FitError(
        f"{where}: written on a big-endian machine", hint="torch.load and torch.save it on a little-endian one"
    )


def _foreign(window: Window, head: bytes) -> CorruptError | FitError:
    """What to say of a file that torch.save did not write."""
    if head[257:262] == b"ustar":
        return FitError(
            f"{window.where}: a tar file, the format of torch before 0.1.10", hint="torch.load and torch.save it again"
        )
    kind, hint = "not a file of torch.save", _AGAIN
    if not head:
        kind, hint = "empty", "the save was cut short: use an earlier checkpoint"
    elif head.startswith(b"version https://git-lfs"):
        kind, hint = "a Git LFS pointer and not the file itself", "run `git lfs pull` in its repository"
    elif not any(head):
        kind, hint = "filled with zeros", "the machine stopped while saving: use an earlier checkpoint"
    elif all(byte >= 0x20 or byte in b"\t\r\n" for byte in head):
        kind = "text and not a file of torch.save"
    return CorruptError(f"{window.where}: {kind}", hint=hint)


__all__ = ["TorchFile", "TorchFiles", "leaf_bytes", "leaf_numpy", "leaf_scalar", "read_torch_file", "with_bytes"]
