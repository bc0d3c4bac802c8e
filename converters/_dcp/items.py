"""Items inside ``.distcp`` files: each is a whole ``torch.save`` zip between others (checkpoint/filesystem.py).

Only the ends of an item are read: its pickle and the directory of its zip, which say where in the file the tensor's
bytes lie. The end of one item and the start of the next are neighbours, so one small read serves both.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ucp.catalog import Checksum
from ucp.container.torchfile import TorchFiles
from ucp.container.window import Window
from ucp.errors import CorruptError, FitError, NotFoundError
from ucp.layout import Shape
from ucp.plan import Extent
from ucp.store import Entry, Store
from ucp.tree import Opaque, TensorLeaf, Tree

from .contents import SMALL
from .metadata import Stored

# What torch writes before a tensor's bytes, and after them: about 600 and 900 bytes.
_HEAD = 768
_TAIL = 1152
_GAP = 1 << 12
_LONGEST_RUN = 1 << 22
_BELONGS = "the .metadata does not belong to these files, or one is damaged: copy the whole folder again"


def tensor_extent(store: Store, stored: Stored, shape: Shape, dtype: str) -> tuple[Extent, tuple[Checksum, ...]]:
    """Where the tensor of one item lies, with its strides, and the checksums of its bytes; see `Items.tensor`."""
    return Items(store, [stored]).tensor(stored, shape, dtype)


def blob(store: Store, stored: Stored) -> Tree:
    """The object of one item; see `Items.blob`."""
    return Items(store, [stored]).blob(stored)


class _Looked(NamedTuple):
    tree: Tree
    checksums: tuple[Checksum, ...]
    small: bytes | None


class Items:
    """The items of a checkpoint, looked at in as few reads as their places allow.

    `wanted` are looked at once, in order of place; any other when asked for. NotFoundError for a missing file,
    CorruptError for an item outside its file or one that is no ``torch.save`` zip, UnsafeError for a malicious one,
    FitError for items that were compressed.
    """

    def __init__(self, store: Store, wanted: Iterable[Stored] = ()) -> None:
        self._store = store
        self._files = TorchFiles(store)
        self.entries: dict[str, Entry] = {}
        self._looked: dict[Stored, _Looked] = {}
        self._look(wanted)

    def tensor(
        self, stored: Stored, shape: Shape, dtype: str, *, key: str = "a tensor"
    ) -> tuple[Extent, tuple[Checksum, ...]]:
        """Where the tensor `key` of an item lies, and the checksums of its bytes.

        CorruptError if it is not of the `shape` and `dtype` that the metadata gives, FitError for tensors whose bytes
        are not their values, such as quantized ones.
        """
        tree, checksums, _ = self._at(stored)
        where = f"{self._store.url}/{stored.object}: {key}"
        if isinstance(tree, Opaque):
            raise FitError(f"{where} is a {tree.path}, not a plain tensor", hint="save it as a tensor of a plain dtype")
        if not isinstance(tree, TensorLeaf):
            raise CorruptError(f"{where} is no tensor", hint=_BELONGS)
        if tree.inline is not None:
            raise FitError(f"{where} has its bytes in a pickle", hint="save it as a tensor of the CPU or a GPU")
        extent = tree.extent
        if extent.shape != shape:
            raise CorruptError(f"{where} has shape {list(extent.shape)}, .metadata says {list(shape)}", hint=_BELONGS)
        if extent.dtype != dtype:
            raise CorruptError(f"{where} is {extent.dtype}, .metadata says {dtype}", hint=_BELONGS)
        return extent, checksums

    def blob(self, stored: Stored) -> Tree:
        """The object of an item as an inert tree; extents of tensors in it lie in the ``.distcp`` file."""
        return self._at(stored).tree

    def small(self, stored: Stored) -> bytes | None:
        """The bytes of a tensor of a few elements, such as a step, which came along; None for others."""
        return self._at(stored).small

    def checksums(self, stored: Stored) -> tuple[Checksum, ...]:
        """The checksums of all tensors of an item."""
        return self._at(stored).checksums

    def _at(self, stored: Stored) -> _Looked:
        if stored not in self._looked:
            self._look([stored])
        return self._looked[stored]

    def _look(self, wanted: Iterable[Stored]) -> None:
        by_object: dict[str, list[Stored]] = {}
        for stored in dict.fromkeys(wanted):
            self._require_plain(stored)
            by_object.setdefault(stored.object, []).append(stored)
        for path, items in by_object.items():
            items.sort(key=lambda stored: stored.offset)
            for stored in items:
                self.require_within(stored)
            for stored, window in self._windows(path, items):
                tree, checksums = self._files.read_part(window, path)
                self._looked[stored] = _Looked(tree, checksums, _small(window, tree))

    def _entry(self, path: str) -> Entry:
        if path not in self.entries:
            try:
                self.entries[path] = self._store.entry(path)
            except NotFoundError as error:
                raise NotFoundError(
                    f"{self._store.url}/{path}: no such file, but .metadata says that it holds items",
                    hint="a file was lost, or the save cut short: copy the whole folder again",
                ) from error
        return self.entries[path]

    def require_within(self, stored: Stored) -> None:
        """CorruptError if an item reaches past the end of its file, NotFoundError if there is no such file."""
        size, stop = self._entry(stored.object).size, stored.offset + stored.length
        if stop > size:
            raise CorruptError(
                f"{self._store.url}/{stored.object}: ends at byte {size}, .metadata has an item reach byte {stop}",
                hint="the file is truncated or from another save: copy the whole folder again",
            )

    def _require_plain(self, stored: Stored) -> None:
        if stored.transforms:
            raise FitError(
                f"{self._store.url}/{stored.object}: items in it are written through {' '.join(stored.transforms)}",
                hint="load the checkpoint with torch.distributed.checkpoint and save it without extensions",
            )

    def _windows(self, path: str, items: list[Stored]) -> Iterator[tuple[Stored, Window]]:
        """Each item with a window that has its ends at hand; runs of bytes are dropped once they are behind."""
        runs = list(_runs(items))
        starts = [start for start, _ in runs]
        held: dict[int, bytes] = {}
        for stored in items:
            first = max(bisect_right(starts, stored.offset) - 1, 0)
            last = bisect_right(starts, stored.offset + stored.length)
            held = {n: held[n] if n in held else self._run(path, runs[n]) for n in range(first, last)}
            kept = [(starts[n] - stored.offset, data) for n, data in held.items()]
            yield stored, Window(self._store, path, stored.length, start=stored.offset, kept=kept)

    def _run(self, path: str, run: tuple[int, int]) -> bytes:
        return self._store.read(path, run[0], run[1] - run[0])


def _small(window: Window, tree: Tree) -> bytes | None:
    if not isinstance(tree, TensorLeaf) or tree.extent.nbytes > SMALL or not tree.extent.is_contiguous:
        return None
    if tree.inline is not None:
        return tree.inline
    return window.bytes_at(tree.extent.offset - window.start, tree.extent.nbytes) if tree.extent.nbytes else b""


def _runs(items: list[Stored]) -> Iterator[tuple[int, int]]:
    """[start, stop) of the reads that bring the ends of `items`, which are in order of place."""
    ends = sorted(end for stored in items for end in _ends(stored))
    start, stop = ends[0]
    for more_start, more_stop in ends[1:]:
        if more_start <= stop + _GAP and more_stop - start <= _LONGEST_RUN:
            stop = max(stop, more_stop)
            continue
        yield start, stop
        start, stop = more_start, more_stop
    yield start, stop


def _ends(stored: Stored) -> Iterator[tuple[int, int]]:
    stop = stored.offset + stored.length
    if stored.length <= _HEAD + _TAIL:
        yield stored.offset, stop
    else:
        yield stored.offset, stored.offset + _HEAD
        yield stop - _TAIL, stop


__all__ = ["Items", "blob", "tensor_extent"]
