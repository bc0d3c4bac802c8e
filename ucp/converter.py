"""Converters: one per checkpoint family, found through the ``ucp.converters`` entry points.

A converter recognises a folder, reads it into a `Catalog`, and may lay a catalog out as a new checkpoint of its family.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, cast

from ucp.catalog import Catalog
from ucp.errors import ConflictError, NotFoundError, UsageError
from ucp.layout import Mesh
from ucp.plan import Digests, Task
from ucp.store import SingleStore, Store, open_source

if TYPE_CHECKING:
    from ucp.lang import Program
    from ucp.store.cloud.http import HttpStore


class Target(Protocol):
    """A checkpoint to be written: its large objects as tasks, then the small ones.

    Tasks may finish in any order; `finish` is called with the digests of all of them and gives (path, bytes) of the
    remaining objects. The last of these is the root: the checkpoint exists exactly when it does. `notes` are remarks a
    user should see before converting, such as what this form of checkpoint has no place for. `losses` say what of the
    things that it does hold would not be exact, such as values rounded to a narrower dtype: a conversion with losses
    is refused unless the user accepts them.
    """

    family: str
    tasks: tuple[Task, ...]
    root: str

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user; empty if there are none."""

    @property
    def losses(self) -> tuple[str, ...]:
        """What would not be exact; empty if everything is."""

    def finish(self, digests: Mapping[str, Digests]) -> Iterator[tuple[str, bytes]]:
        """Small objects in the order in which to put them, the root last."""


class Converter(Protocol):
    """Reads, and perhaps writes, one family of checkpoints."""

    family: str

    def detect(self, store: Store) -> bool:
        """Whether the folder looks like a checkpoint of this family; cheap, a listing or a small read."""

    def read(self, store: Store, **options: Any) -> Catalog:
        """The catalog of the checkpoint. Reads metadata only; typed errors for whatever is missing or damaged."""

    def target(self, catalog: Catalog, store: Store, **options: Any) -> Target:
        """Lay `catalog`, which lies in `store`, out as a checkpoint of this family; UsageError if it cannot write.

        Families with layouts to choose from take one as the option `layout`, a `Layout`. Where they write by logical
        names, the class has ``logical = True``.
        """


@dataclass(frozen=True, slots=True)
class Layout:
    """How a target is to be laid out: ranks of each mesh axis, and the program that says what each of them holds.

    `program` is None where the family is to choose. `sizes` and `flags` are the program's.
    """

    mesh: Mesh = field(default_factory=lambda: Mesh({}))
    program: Program | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.mesh.axes or self.program is not None or self.sizes or self.flags)


@dataclass(frozen=True, slots=True)
class Sharded:
    """A checkpoint as the coordinates of a mesh hold it, before a conversion program puts its tensors together.

    `parts` are (coordinate, catalog of what is held there), all of one store; axes left out of a coordinate are not
    distinguished. `config` and `flags` are sizes and flags as the source's configuration gives them, whether or not a
    program knows them; `cuts` and `placements` are recorded
    boundaries and placements, as in `ucp.layout.compile.Setting`. `program` names the program that comes with ucp and
    fits the shards, where the checkpoint tells.
    """

    parts: Sequence[tuple[Mapping[str, int], Catalog]]
    mesh: Mesh
    config: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    cuts: Mapping[tuple[str, tuple[str, ...]], tuple[int, ...]] = field(default_factory=dict)
    placements: Mapping[tuple[str, str], Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    program: str | None = None


class ShardReader(Protocol):
    """What a converter has besides if its family keeps tensors that only a program can put together."""

    def sharded(self, store: Store, **options: Any) -> Sharded:
        """The checkpoint by mesh coordinates. Reads metadata only; raises what `Converter.read` raises."""


class Naming(Protocol):
    """What a converter has besides if its checkpoints can be read where nothing can be listed, as over HTTP."""

    def files(self, store: Store) -> Iterable[str]:
        """Paths that a checkpoint of the family may have, as far as names, or the root objects there, tell.

        What the reader finds by paths that its root names, without asking for lists, need not be among them.
        """


class Mounting(Protocol):
    """What a converter has besides if checkpoints of its family may share objects that lie outside their folder."""

    def mounted(self, store: Store, catalog: Catalog) -> Store:
        """`store` with all objects that `catalog`, read from it, names."""


@cache
def _entries() -> dict[str, EntryPoint]:
    """Installed converters by family, none of them imported yet."""
    return {entry.name: entry for entry in entry_points(group="ucp.converters")}


def families() -> list[str]:
    """The families that have a converter, sorted."""
    return sorted(_entries())


@cache
def converter(family: str) -> Converter:
    """The converter of `family`; UsageError if there is none, or if it cannot be imported."""
    if family not in _entries():
        raise UsageError(f"no converter for {family!r}", hint=f"installed: {' '.join(families())}")
    try:
        found: Converter = _entries()[family].load()
    except Exception as error:
        raise UsageError(
            f"the converter for {family!r} cannot be imported: {type(error).__name__}: {error}",
            hint=f"mend or remove the package that provides {_entries()[family].value}",
        ) from error
    return found


def _is_checkpoint(store: Store) -> bool:
    """Whether any converter that can be imported recognises the folder."""
    for name in families():
        with suppress(UsageError):
            if converter(name).detect(store):
                return True
    return False


def read_catalog(url: str, *, family: str | None = None, **options: Any) -> tuple[Catalog, Store]:
    """Detect the family of the checkpoint at `url`, read it, and return it with the store it lies in.

    NotFoundError if nothing is there or no converter knows it. A converter that cannot be imported is passed over.
    """
    found, store = find_converter(url, family=family)
    catalog = _addressed(found.read(store, **options), store)
    return catalog, _mounted(found, store, catalog)


def read_sharded(url: str, *, family: str | None = None, **options: Any) -> tuple[Sharded, Store]:
    """Like `read_catalog`, but by mesh coordinates, as a conversion program wants it.

    A family that puts its tensors together by itself gives one part, on a mesh without axes.
    """
    found, store = find_converter(url, family=family)
    if hasattr(found, "sharded"):
        sharded = cast("ShardReader", found).sharded(store, **options)
        return replace(sharded, parts=[(at, _addressed(part, store)) for at, part in sharded.parts]), store
    catalog = _addressed(found.read(store, **options), store)
    return Sharded([({}, catalog)], Mesh({})), _mounted(found, store, catalog)


def _mounted(found: Converter, store: Store, catalog: Catalog) -> Store:
    """The store in which all objects of `catalog` are found: some families keep objects outside its folder."""
    return cast("Mounting", found).mounted(store, catalog) if hasattr(found, "mounted") else store


def _addressed(catalog: Catalog, store: Store) -> Catalog:
    """A catalog read from a single file has the URL of the file, which opens it again."""
    return replace(catalog, url=store.address) if isinstance(store, SingleStore) else catalog


def _listing(found: Converter, store: Store) -> Store | None:
    """`store`, which lists at least what a checkpoint of the family may have; None if that cannot be known."""
    if store.lists or isinstance(store, SingleStore):
        return store
    return cast("HttpStore", store).knowing(cast("Naming", found).files(store)) if hasattr(found, "files") else None


def _check_single(family: str, store: Store) -> None:
    """ConflictError where two jobs have saved to one place in different forms, so that neither is the one."""
    if family == "native" and converter("universal").detect(store):
        raise ConflictError(
            f"{store.url}: holds two checkpoints, a native and a universal one",
            hint="two jobs saved to the same place; say which is meant: family= or --family native or universal",
        )


def find_converter(url: str, *, family: str | None = None) -> tuple[Converter, Store]:
    """The converter of `family`, or the first that recognises what is at `url`, and the store of `url`.

    `url` is that of a folder, or of a file that is a checkpoint by itself. ConflictError for a folder that holds a
    native checkpoint and a universal one.
    """
    store = open_source(url)
    if family is not None:
        found = converter(family)
        return found, _listing(found, store) or store
    broken = []
    for name in families():
        try:
            candidate = converter(name)
        except UsageError as error:
            broken.append(error.message)
            continue
        place = _listing(candidate, store)
        if place is not None and candidate.detect(place):
            _check_single(name, place)
            return candidate, place
    if not (store.lists or isinstance(store, SingleStore)):
        raise NotFoundError(
            f"{store.url}: no checkpoint that can be read over HTTP, where nothing can be listed",
            hint="universal, native and Hugging Face folders can, and single files; copy others elsewhere first. To a "
            "reader, what it may not read (403) is not there",
        )
    if not store.children():
        raise NotFoundError(f"{store.url}: no such folder, or it is empty")
    hint = f"known: {' '.join(families())}; an interrupted conversion is none until it is finished"
    inside = [name for name in store.children() if name.endswith("/") and _is_checkpoint(store.child(name[:-1]))]
    if inside:
        hint = f"it holds {' '.join(name[:-1] for name in inside)}: name one of these"
    where = store.address if isinstance(store, SingleStore) else store.url
    raise NotFoundError(f"{where}: not a checkpoint of a known family", hint="; ".join([hint, *broken]))
