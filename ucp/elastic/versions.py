"""Versions of a job's state: what nodes hold of them, and which of them are whole between the nodes that are left.

A version lies in folder ``e<epoch>/step-<step>`` of each node's part of a tier and is an ordinary native checkpoint.
An epoch is one start of the job, so that versions of different histories never share a folder. Beside the versions
of an epoch lies ``epoch.json``, which says on which node each of its ranks ran. ``run.json`` in each node's part of a
tier says which run's all of that is (`ucp.elastic.records`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ucp.elastic.records import run_of
from ucp.errors import ContentError, NotFoundError
from ucp.format.native_manifest import ROOT, NativeManifest, loads
from ucp.lifecycle.shelf import folder_name
from ucp.store import Store

ORDER = ("memory", "local", "storage")
"""The tiers, nearest first."""

EPOCH_FILE = "epoch.json"
RUN_FILE = "run.json"

_FOLDER = re.compile(r"e(\d{5,})/(?:step-(\d{8,})/(.+)|epoch\.json)")
_RANK = re.compile(r"shards/rank-(\d+)-")
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Version:
    """One version. `epoch` is that of the start of the job that saved it, 0 in storage, which keeps one history.

    `id` is that of its manifest. `committed` says that its save was completed once; `missing` says what of it is
    nowhere any more. `foreign` says that it is another run's.
    """

    step: int
    epoch: int
    tier: str
    url: str
    id: str = ""
    committed: bool = True
    missing: tuple[str, ...] = ()
    foreign: bool = False

    @property
    def complete(self) -> bool:
        """Whether it can be loaded, as far as listings tell."""
        return self.committed and not self.missing and not self.foreign

    @property
    def order(self) -> tuple[int, int, int]:
        """The greatest is the one to take: by step, then epoch, then the nearest tier."""
        return self.step, self.epoch, -ORDER.index(self.tier)

    @property
    def why(self) -> str:
        """Why it cannot be loaded, empty if it can."""
        if self.foreign:
            return "of another run"
        if not self.committed:
            return "its save was cut short"
        more = f" and {len(self.missing) - _MOST_NAMED} more" if len(self.missing) > _MOST_NAMED else ""
        return f"nowhere any more: {', '.join(self.missing[:_MOST_NAMED])}{more}" if self.missing else ""

    def __str__(self) -> str:
        return f"step {self.step}{f' of epoch {self.epoch}' if self.epoch else ''} in {self.tier}"


def folder_of(epoch: int, step: int) -> str:
    """Folder of a version in a node's part of a tier."""
    return f"{epoch_folder(epoch)}/{folder_name(step)}"


def epoch_folder(epoch: int) -> str:
    """Folder of the versions of an epoch."""
    return f"e{epoch:05}"


@dataclass(frozen=True, slots=True)
class Root:
    """What one copy of a version's manifest names: the sizes of all objects by path."""

    id: str
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Part:
    """What one node holds of the version of `step` of `epoch`: sizes of `objects`, and the root if it has one.

    `damage` says what is wrong with the node's copy of the root.
    """

    step: int
    epoch: int
    objects: Mapping[str, int]
    root: Root | None = None
    damage: str = ""

    @property
    def folder(self) -> str:
        """Where it lies on the node."""
        return folder_of(self.epoch, self.step)


@dataclass(frozen=True, slots=True)
class Shown:
    """What one `node` has to show of a tier, which is that of `run` (empty where that is not told).

    `placed` are, by epoch, the nodes of its ranks in their order.
    """

    node: str
    parts: tuple[Part, ...] = ()
    placed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    epochs: frozenset[int] = frozenset()
    run: str = ""

    def of(self, run: str) -> bool:
        """Whether what it has is that of `run`, as far as is told."""
        return not run or self.run in ("", run)


def show(node: str, store: Store) -> Shown:
    """What lies in a node's own folder, by one listing; of each version the root is read."""
    objects: dict[tuple[int, int], dict[str, int]] = {}
    epochs: set[int] = set()
    for entry in store.entries():
        if (found := _FOLDER.fullmatch(entry.path)) is None:
            continue
        epochs.add(int(found[1]))
        if found[2] is not None:
            objects.setdefault((int(found[1]), int(found[2])), {})[found[3]] = entry.size
    parts = (_part(store, step, epoch, held) for (epoch, step), held in sorted(objects.items()))
    placed = {epoch: nodes for epoch in epochs if (nodes := _placed(store, epoch))}
    return Shown(node, tuple(parts), placed, frozenset(epochs), _run_of(store))


def steps_in(store: Store) -> set[tuple[int, int]]:
    """(step, epoch) of all of which a node holds anything, by one listing."""
    found = (_FOLDER.fullmatch(entry.path) for entry in store.entries())
    return {(int(one[2]), int(one[1])) for one in found if one is not None and one[2] is not None}


def _part(store: Store, step: int, epoch: int, objects: Mapping[str, int]) -> Part:
    if ROOT not in objects:
        return Part(step, epoch, objects)
    where = f"{folder_of(epoch, step)}/{ROOT}"
    try:
        manifest = loads(store.read(where), where=f"{store.url}/{where}")
    except (ContentError, NotFoundError) as error:
        return Part(step, epoch, objects, damage=str(error))
    if manifest.step != step:
        return Part(step, epoch, objects, damage=f"{store.url}/{where}: of step {manifest.step}, not {step}")
    return Part(step, epoch, objects, root_of(manifest))


def root_of(manifest: NativeManifest) -> Root:
    """What a manifest names."""
    sizes = {shard.path: shard.size for shard in manifest.shards}
    return Root(manifest.id, sizes | {file.path: file.size for file in manifest.files.values()})


def record_of(nodes: Sequence[str]) -> bytes:
    """The text of ``epoch.json``: the node of each rank."""
    return json.dumps({"format": "epoch", "version": 1, "nodes": list(nodes)}).encode()


def mark_of(run: str) -> bytes:
    """The text of ``run.json`` on a node."""
    return json.dumps({"format": "run", "version": 1, "id": run}).encode()


def _run_of(store: Store) -> str:
    try:
        return run_of(store.read(RUN_FILE))
    except NotFoundError:
        return ""


def _placed(store: Store, epoch: int) -> tuple[str, ...]:
    """The nodes of the ranks of an epoch; empty where that is not told, which only makes messages say less."""
    try:
        doc = json.loads(store.read(f"{epoch_folder(epoch)}/{EPOCH_FILE}"))
        nodes = doc["nodes"]
    except (NotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(map(str, nodes)) if isinstance(nodes, list) else ()


def versions_of(shown: Sequence[Shown], *, tier: str, url: str, run: str = "") -> list[Version]:
    """The versions that nodes hold between them, each complete or with what is missing; in no order.

    Two saves in one folder, as of a node that was away while its epoch's number was given again, are two versions.
    What nodes hold of another run than `run` is put together apart, and foreign.
    """
    own = _between([one for one in shown if one.of(run)], tier, url)
    others = _between([one for one in shown if not one.of(run)], tier, url)
    return [*own, *(replace(version, foreign=True) for version in others)]


def _between(shown: Sequence[Shown], tier: str, url: str) -> list[Version]:
    placed = {epoch: nodes for one in shown for epoch, nodes in one.placed.items()}
    folders: dict[tuple[int, int], list[tuple[str, Part]]] = {}
    for one in shown:
        for part in one.parts:
            folders.setdefault((part.epoch, part.step), []).append((one.node, part))
    here = {one.node for one in shown}
    return [
        version
        for (epoch, step), held in sorted(folders.items())
        for version in _versions(
            Version(step, epoch, tier, f"{url}/{folder_of(epoch, step)}"), held, here, placed.get(epoch, ())
        )
    ]


def _versions(
    version: Version, held: Sequence[tuple[str, Part]], here: set[str], placed: Sequence[str]
) -> Iterator[Version]:
    roots = {part.root.id: part.root for _, part in held if part.root is not None}
    if not roots:
        damaged = [f"{ROOT} (damaged on {node}: {part.damage})" for node, part in held if part.damage]
        yield replace(version, committed=bool(damaged), missing=tuple(damaged))
        return
    for root in roots.values():
        missing = tuple(
            _told(path, here, placed)
            for path, size in root.sizes.items()
            if not any(part.objects.get(path) == size for _, part in held)
        )
        yield replace(version, id=root.id, missing=missing)


def _told(path: str, here: Iterable[str], placed: Sequence[str]) -> str:
    """A missing object, with the node of the rank that wrote it."""
    if (found := _RANK.match(path)) is None or int(found[1]) >= len(placed):
        return path
    node = placed[int(found[1])]
    return f"{path} (of rank {int(found[1])} on node {node}, which {'lost it' if node in here else 'is gone'})"
