"""Converters: one per checkpoint family, found through the ``ucp.converters`` entry points.

A converter recognises a folder, reads it into a `Catalog`, and may lay a catalog out as a new checkpoint of its family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, cast

from ucp.catalog import Catalog
from ucp.errors import NotFoundError, UsageError
from ucp.layout import Mesh
from ucp.plan import Digests, Task
from ucp.store import Store, open_store


class Target(Protocol):
    """A checkpoint to be written: its large objects as tasks, then the small ones.

    Tasks may finish in any order; `finish` is called with the digests of all of them and gives (path, bytes) of the
    remaining objects. The last of these is the root: the checkpoint exists exactly when it does. `notes` are remarks a
    user should see before converting, such as what this form of checkpoint cannot hold.
    """

    family: str
    tasks: tuple[Task, ...]
    root: str

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user; empty if there are none."""

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
        """Lay `catalog`, which lies in `store`, out as a checkpoint of this family; UsageError if it cannot write."""


@dataclass(frozen=True, slots=True)
class Sharded:
    """A checkpoint as the coordinates of a mesh hold it, before a conversion program puts its tensors together.

    `parts` are (coordinate, catalog of what is held there), all of one store; axes left out of a coordinate are not
    distinguished. `config` and `flags` are sizes and flags as the source's configuration gives them, whether or not a
    program knows them; `cuts` and `placements` are recorded
    boundaries and placements, as in `ucp.layout.compile.Setting`.
    """

    parts: Sequence[tuple[Mapping[str, int], Catalog]]
    mesh: Mesh
    config: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    cuts: Mapping[tuple[str, tuple[str, ...]], tuple[int, ...]] = field(default_factory=dict)
    placements: Mapping[tuple[str, str], Mapping[int, tuple[int, ...]]] = field(default_factory=dict)


class ShardReader(Protocol):
    """What a converter has besides if its family keeps tensors that only a program can put together."""

    def sharded(self, store: Store, **options: Any) -> Sharded:
        """The checkpoint by mesh coordinates. Reads metadata only; raises what `Converter.read` raises."""


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
    return found.read(store, **options), store


def read_sharded(url: str, *, family: str | None = None, **options: Any) -> tuple[Sharded, Store]:
    """Like `read_catalog`, but by mesh coordinates, as a conversion program wants it.

    A family that puts its tensors together by itself gives one part, on a mesh without axes.
    """
    found, store = find_converter(url, family=family)
    if hasattr(found, "sharded"):
        return cast("ShardReader", found).sharded(store, **options), store
    return Sharded([({}, found.read(store, **options))], Mesh({})), store


def find_converter(url: str, *, family: str | None = None) -> tuple[Converter, Store]:
    """The converter of `family`, or the first that recognises what is at `url`, and the store of `url`."""
    store = open_store(url)
    if family is not None:
        return converter(family), store
    broken = []
    for name in families():
        try:
            candidate = converter(name)
        except UsageError as error:
            broken.append(error.message)
            continue
        if candidate.detect(store):
            return candidate, store
    if not store.children():
        raise NotFoundError(f"{store.url}: no such folder, or it is empty")
    hint = f"known: {' '.join(families())}; an interrupted conversion is none until it is finished"
    inside = [name for name in store.children() if name.endswith("/") and _is_checkpoint(store.child(name[:-1]))]
    if inside:
        hint = f"it holds {' '.join(name[:-1] for name in inside)}: name one of these"
    raise NotFoundError(f"{store.url}: not a checkpoint of a known family", hint="; ".join([hint, *broken]))
