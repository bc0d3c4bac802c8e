"""Tensors of ByteCheckpoint: bare storage bytes in files, what they are in ``.metadata``.

``all_tensor_metadata`` has for each item the pickle that ``torch.save`` would write for the tensor, but its bytes
(bytecheckpoint/utilities/serialization.py, ``_serialize_tensor``), and None for objects, which are files of torch.save.
"""

from __future__ import annotations

from collections.abc import Mapping

from ucp.container.machine import Machine
from ucp.container.tensors import storage_dtype, storage_itemsize, storage_leaf
from ucp.container.unpickle import unpickle
from ucp.errors import CorruptError, FitError
from ucp.layout import Box, Shape
from ucp.plan import Extent, Fragment, TensorSpec
from ucp.store import Store
from ucp.tree import Opaque, TensorLeaf, Tree

from .._dcp.contents import SMALL, Contents, Held, Path
from .._dcp.items import Items
from .._dcp.metadata import METADATA, Chunk, Metadata, Stored, moved, read_metadata
from .._dcp.pieces import assemble, check_places, distinct_chunks

_AGAIN = "the .metadata is damaged or does not belong to these files: copy the whole folder again"
_FLAT = "fsdp_flat_param_to_fqns"


def read_part(store: Store, folder: str) -> tuple[Contents, Metadata]:
    """Everything in ``model`` or ``optimizer`` of a step, by its keys there.

    Raises what `ucp.converters._dcp.pieces.read_contents` raises, and FitError for flat parameters of FSDP1.
    """
    path = f"{folder}/{METADATA}"
    where = f"{store.url}/{path}"
    metadata = moved(read_metadata(store, path), folder)
    noted = metadata.extra.get("user_defined_dict")
    if isinstance(noted, dict) and _FLAT in noted:
        raise FitError(
            f"{where}: FSDP's flat parameters were saved as they are, which is not read yet",
            hint="save them by name, which is what ByteCheckpoint does by default",
        )
    check_places(where, metadata)
    reader = _Reader(store, where, headers(metadata, where), metadata)
    tensors = {key: reader.held(key) for key in metadata.tensors}
    values = {key: reader.items.blob(stored) for key, stored in metadata.blobs.items()}
    paths: dict[str, Path] = dict(metadata.planner or {})
    known = {key: paths.get(key, (key,)) for key in [*paths, *metadata.tensors, *metadata.blobs]}
    sums = tuple(checksum for stored in metadata.blobs.values() for checksum in reader.items.checksums(stored))
    entries = (store.entry(path), *reader.items.entries.values())
    paths = {key: path for key, path in known.items() if key in tensors or key in values}
    return Contents(where, tensors, values, paths, bool(metadata.planner), sums, entries), metadata


def headers(metadata: Metadata, where: str) -> dict[tuple[str, Shape], bytes]:
    """The pickle of each tensor item, by key and offsets; CorruptError naming `where` if there is no such table."""
    table = metadata.extra.get("all_tensor_metadata")
    if not isinstance(table, dict):
        raise CorruptError(f"{where}: no all_tensor_metadata", hint=_AGAIN)
    found: dict[tuple[str, Shape], bytes] = {}
    for index, header in table.items():
        key, offset = (index.attribute(name) if isinstance(index, Opaque) else None for name in ("fqn", "offset"))
        if isinstance(key, str) and isinstance(offset, tuple) and isinstance(header, bytes):
            found[key, tuple(offset)] = header
    return found


class _Reader:
    """Reads the items of one `metadata`, whose file is `where`."""

    def __init__(
        self, store: Store, where: str, headers: Mapping[tuple[str, Shape], bytes], metadata: Metadata
    ) -> None:
        self.where = where
        self.items = Items(store, metadata.blobs.values())
        self._store = store
        self._headers = headers
        self._metadata = metadata

    def held(self, key: str) -> Held:
        """The tensor of one key, checked."""
        entry = self._metadata.tensors[key]
        chunks = distinct_chunks(self.where, key, entry)
        fragments = [
            Fragment(Box(chunk.offsets, chunk.sizes), self._extent(key, chunk, entry.dtype)) for chunk in chunks
        ]
        spec = TensorSpec(entry.shape, entry.dtype)
        small = None
        if len(fragments) == 1 and spec.nbytes <= SMALL and fragments[0].extent.is_contiguous:
            extent = fragments[0].extent
            small = self._store.read(extent.object, extent.offset, extent.nbytes)
        return assemble(self._store.url, key, spec, tuple(fragments), small=small)

    def _extent(self, key: str, chunk: Chunk, dtype: str) -> Extent:
        stored = chunk.stored
        assert stored is not None
        self.items.require_within(stored)
        leaf = self._leaf(key, chunk.offsets, stored)
        extent = leaf.extent
        if extent.shape != chunk.sizes or extent.dtype != dtype:
            raise CorruptError(
                f"{self.where}: {key}: the item at {list(chunk.offsets)} is {extent.dtype} {list(extent.shape)}, the "
                f"chunk {dtype} {list(chunk.sizes)}",
                hint=_AGAIN,
            )
        return extent

    def _leaf(self, key: str, offsets: Shape, stored: Stored) -> TensorLeaf:
        header = self._headers.get((key, offsets))
        if header is None:
            raise CorruptError(f"{self.where}: {key}: nothing says what lies at {list(offsets)}", hint=_AGAIN)

        def persistent(machine: Machine, reference: Tree) -> Tree:
            return _storage(machine, reference, stored)

        tree = unpickle(header, where=f"{self.where}: {key}", persistent=persistent)
        if isinstance(tree, Opaque):
            raise FitError(f"{self.where}: {key} is a {tree.path}, not a plain tensor")
        if not isinstance(tree, TensorLeaf):
            raise CorruptError(f"{self.where}: {key} is no tensor", hint=_AGAIN)
        return tree


def _storage(machine: Machine, reference: Tree, stored: Stored) -> Tree:
    """The bytes of an item as the storage that ``("storage", class, key, location, count)`` refers to."""
    if not isinstance(reference, tuple) or len(reference) != 5 or storage_dtype(reference[1]) is None:
        machine.fail("a reference to something that is no storage")
    kind, count = reference[1], reference[4]
    if type(count) is not int or count < 0 or count * storage_itemsize(kind) != stored.length:
        machine.fail(f"a storage that is not of the {stored.length} bytes that are stored")
    return storage_leaf(kind, object=stored.object, offset=stored.offset, count=count)
