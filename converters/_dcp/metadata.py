"""``.metadata`` of torch.distributed.checkpoint: which tensors and objects there are, and in which files they lie.

It is a pickle of ``Metadata`` (torch/distributed/checkpoint/metadata.py), the same since torch 2.1; the places of items
in files are ``_StorageInfo`` (torch/distributed/checkpoint/filesystem.py). Megatron-Core pickles a subclass and adds
attributes. The pickle is read as inert data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ucp.container.unpickle import unpickle
from ucp.container.values import Reference
from ucp.errors import CorruptError, NotFoundError, UnsafeError
from ucp.layout import Shape
from ucp.store import Store
from ucp.tree import Opaque, Tree

METADATA = ".metadata"
_AGAIN = "the save was cut short or the file is damaged: copy the whole folder again, or use an earlier checkpoint"
_MOST_DIMS = 64


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one item lies: bytes ``[offset, offset + length)`` of `object`, a path relative to the checkpoint.

    `transforms` names what the bytes went through, such as ``stream.zstd/1`` (checkpoint/_extension.py).
    """

    object: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


class Chunk(NamedTuple):
    """One rectangular piece of a tensor; `stored` is None for a piece without elements that was not written."""

    offsets: Shape
    sizes: Shape
    stored: Stored | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: global shape, dtype (torch's name without ``torch.``) and its chunks as the metadata lists them."""

    shape: Shape
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """What ``.metadata`` says. `tensors` and `blobs` (pickled objects) by their flat key, in the order of saving.

    `planner` maps flat keys to the paths they were flattened from, and is None where nothing was (Megatron-Core);
    `version` is that of DCP, None in checkpoints of older torch; `extra` are attributes that others added.
    """

    tensors: Mapping[str, Entry]
    blobs: Mapping[str, Stored]
    planner: Mapping[str, tuple[str | int, ...]] | None
    version: str | None
    extra: Mapping[str, Tree]

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """(key, place) of everything there is."""
        for key, entry in self.tensors.items():
            yield from ((key, chunk.stored) for chunk in entry.chunks if chunk.stored is not None)
        yield from self.blobs.items()


def read_metadata(store: Store, path: str = METADATA) -> Metadata:
    """Read ``.metadata``.

    NotFoundError if there is none, CorruptError for one that is damaged or contradicts itself, UnsafeError for one that
    asks for code or for files outside of the checkpoint.
    """
    where = f"{store.url}/{path}"
    try:
        data = store.read(path)
    except NotFoundError as error:
        raise NotFoundError(
            f"{where}: no such file", hint="it is written last, so this save was cut short: use an earlier checkpoint"
        ) from error
    return parse_metadata(data, where=where)


def moved(metadata: Metadata, folder: str) -> Metadata:
    """`metadata` with the paths of files relative to the checkpoint and not to `folder`."""

    def move(stored: Stored | None) -> Stored | None:
        return None if stored is None else replace(stored, object=f"{folder}/{stored.object}")

    tensors = {
        key: replace(entry, chunks=tuple(chunk._replace(stored=move(chunk.stored)) for chunk in entry.chunks))
        for key, entry in metadata.tensors.items()
    }
    blobs = {key: replace(stored, object=f"{folder}/{stored.object}") for key, stored in metadata.blobs.items()}
    return replace(metadata, tensors=tensors, blobs=blobs)


def parse_metadata(data: bytes, *, where: str) -> Metadata:
    """Like `read_metadata` for the bytes of the file; `where` names it in errors."""
    return _Parser(where).metadata(unpickle(data, where=where, large=True))


class _Parser:
    """Turns inert objects into ours, or says what is wrong with the file `where`."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.places: dict[tuple[str, Shape | None], Stored] = {}
        self.used: set[tuple[str, Shape | None]] = set()

    def metadata(self, root: Tree) -> Metadata:
        attributes = self._attributes(root, "the whole")
        for index, info in self._mapping(attributes.pop("storage_data", None), "storage_data").items():
            self._place(index, info)
        tensors: dict[str, Entry] = {}
        blobs: dict[str, Stored] = {}
        for key, held in self._mapping(attributes.pop("state_dict_metadata", None), "state_dict_metadata").items():
            if not isinstance(key, str) or not isinstance(held, Opaque):
                raise self._fault(f"{key!r:.80} is no key of a tensor or object")
            if held.name == "BytesStorageMetadata":
                blobs[key] = self._blob(key)
            else:
                tensors[key] = self._entry(key, held)
        self._all_used()
        planner, version = attributes.pop("planner_data", None), attributes.pop("version", None)
        return Metadata(tensors, blobs, self._planner(planner), version if type(version) is str else None, attributes)

    def _place(self, index: Tree, info: Tree) -> None:
        """One item of ``storage_data``: MetadataIndex(fqn, offset, index) -> _StorageInfo."""
        at, found = self._attributes(index, "storage_data"), self._attributes(info, "storage_data")
        key, offset = at.get("fqn"), at.get("offset")
        if type(key) is not str:
            raise self._fault("storage_data has an item without a name")
        name = (key, None if offset is None else self._shape(offset, key))
        if name in self.places:
            raise self._fault(f"{key}: two items in storage_data")
        self.places[name] = self._stored(key, found)

    def _stored(self, key: str, info: Mapping[str, Tree]) -> Stored:
        path, offset, length = (info.get(part) for part in ("relative_path", "offset", "length"))
        transforms = info.get("transform_descriptors") or ()
        if type(path) is not str or type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise self._fault(f"{key}: storage_data does not say where it lies")
        if not isinstance(transforms, list | tuple) or not all(type(part) is str for part in transforms):
            raise self._fault(f"{key}: transform_descriptors are no names")
        if not path or path.startswith("/") or not {"\\", "\0"}.isdisjoint(path) or ".." in path.split("/"):
            raise UnsafeError(
                f"{self.where}: {key} lies at {path!r:.200}, outside of the checkpoint", hint="do not trust this file"
            )
        return Stored(path, offset, length, tuple(transforms))

    def _entry(self, key: str, held: Opaque) -> Entry:
        attributes = self._attributes(held, key)
        shape = self._shape(attributes.get("size"), key)
        chunks = attributes.get("chunks")
        if not isinstance(chunks, list | tuple):
            raise self._fault(f"{key}: no list of chunks")
        dtype = self._dtype(attributes.get("properties"), key)
        return Entry(shape, dtype, tuple(self._chunk(key, chunk, shape) for chunk in chunks))

    def _chunk(self, key: str, chunk: Tree, shape: Shape) -> Chunk:
        attributes = self._attributes(chunk, key)
        offsets = self._shape(attributes.get("offsets"), key)
        sizes = self._shape(attributes.get("sizes"), key)
        if not len(offsets) == len(sizes) == len(shape):
            raise self._fault(f"{key}: a chunk of {len(sizes)} dims in a tensor of {len(shape)}")
        place = (key, offsets)
        stored = self.places.get(place)
        if stored is None and 0 not in sizes:
            raise self._fault(f"{key}: the chunk at {list(offsets)} lies in no file")
        self.used.add(place)
        return Chunk(offsets, sizes, stored)

    def _blob(self, key: str) -> Stored:
        if (key, None) not in self.places:
            raise self._fault(f"{key}: lies in no file")
        self.used.add((key, None))
        return self.places[key, None]

    def _all_used(self) -> None:
        for key, offsets in self.places.keys() - self.used:
            place = "" if offsets is None else f" at {list(offsets)}"
            raise self._fault(f"{key}: storage_data has an item{place} that state_dict_metadata does not know")

    def _dtype(self, properties: Tree, key: str) -> str:
        """``TensorProperties`` pickles a tuple, dtype first (its ``__getstate__``)."""
        state = properties.state if isinstance(properties, Opaque) else None
        first = (
            state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
        )
        if not isinstance(first, Reference) or first.module != "torch":
            raise self._fault(f"{key}: no dtype")
        return first.name

    def _planner(self, planner: Tree) -> Mapping[str, tuple[str | int, ...]] | None:
        if planner is None:
            return None
        paths: dict[str, tuple[str | int, ...]] = {}
        for key, path in self._mapping(planner, "planner_data").items():
            if not isinstance(path, tuple) or not all(isinstance(part, str | int) for part in path):
                raise self._fault(f"planner_data of {key!r:.80} is no path")
            paths[key] = path
        return paths

    def _attributes(self, node: Tree, what: str) -> dict[str, Tree]:
        if not isinstance(node, Opaque) or not isinstance(node.state, dict):
            raise self._fault(f"{what}: {type(node).__name__} where an object of DCP is expected")
        return dict(node.state)

    def _mapping(self, node: Tree, what: str) -> Mapping[Tree, Tree]:
        if not isinstance(node, dict):
            raise self._fault(f"{what} is no dict")
        return node

    def _shape(self, node: Tree, key: str) -> Shape:
        honest = isinstance(node, tuple | list) and len(node) <= _MOST_DIMS
        if not honest or not all(type(n) is int and 0 <= n < 1 << 60 for n in node):
            raise self._fault(f"{key}: {node!r:.80} is no shape")
        return tuple(node)

    def _fault(self, problem: str) -> CorruptError:
        return CorruptError(f"{self.where}: {problem}", hint=_AGAIN)
