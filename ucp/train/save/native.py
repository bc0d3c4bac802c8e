"""The native form: every rank writes its own shards, as they lie in its memory, and rank 0 the manifest, last.

Normative text of what is written: spec/shard-format.md.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

import torch
from crc32c import crc32c

from ucp.catalog import Source
from ucp.errors import FitError, NotFoundError, StorageError, UcpError
from ucp.format.documents import Json
from ucp.format.native_manifest import ROOT, NativeManifest, Part, Shard, blobs_path, dumps, is_ours
from ucp.format.native_shard import Piece, ShardFile, shard_files
from ucp.format.pool import POOL, name_in
from ucp.format.records import File
from ucp.format.state import Encoder
from ucp.plan import Key
from ucp.share.lease import Lease
from ucp.store import Store
from ucp.train.save.digest import blocks
from ucp.train.save.form import Form, Task
from ucp.train.save.ground import Ground, check_whole, unchanged
from ucp.train.save.plan import Cut, Plan
from ucp.train.save.shared import SharedBrief, remember, write_shared
from ucp.train.save.whole import Whole

_LOG = logging.getLogger("ucp")
_LEFT = "%s: what an earlier save has left could not be removed: %s"


@dataclass(slots=True)
class Written:
    """What one rank has written."""

    shards: list[Shard] = field(default_factory=list)
    parts: list[tuple[Key, Part]] = field(default_factory=list)
    reused: int = 0
    """Bytes of shards that were there already."""


class NativeForm(Form):
    """Shards and ``ucp.json``; what several checkpoints of a run have in common, lies in its pool if they `share`."""

    name = "native"
    root = ROOT

    def __init__(self, *, share: bool = False) -> None:
        self.share = share
        self._lease: Lease | None = None

    def is_ours(self, path: str) -> bool:
        """Whether it lies where shards do, or tensors of the training state."""
        return is_ours(path)

    def brief(
        self, whole: Whole, plans: Sequence[Plan], store: Store, ground: Ground, tag: str
    ) -> Sequence[SharedBrief | None]:
        """What the pool offers, under a lease that rank 0 holds until all is over."""
        if not self.share:
            return [None for _ in plans]
        self._lease = Lease(store.sibling(POOL), store.url.rpartition("/")[2])
        return [SharedBrief.of(self._lease, whole.tensors)] * len(plans)

    def write(self, task: Task) -> Written:
        """Write a rank's shards, durably; StorageError where that fails."""
        if task.brief is None:
            return self._write(task, task.plan.write)
        found = write_shared(task)
        done = self._write(task, found.left)
        remember(task, found, done.parts)
        return Written([*done.shards, *found.shards], [*done.parts, *found.parts], found.reused)

    def _write(self, task: Task, write: Sequence[Cut]) -> Written:
        done = Written()
        cuts = {cut.piece: cut for cut in write}
        files = list(_files(task, write))
        for file in files:
            _write_file(task, file, cuts, done)
        try:
            task.store.flush([file.path for file in files])
        except NotFoundError as error:
            raise StorageError(f"{error.message}: removed while it was written", hint="save again") from error
        return done

    def commit(self, whole: Whole, task: Task, written: Sequence[Written]) -> int:
        """The manifest: from then on there is a checkpoint. What dead saves have left in the folder is removed."""
        store, shards = task.store, tuple(shard for one in written for shard in one.shards)
        shared = {name: shard.size for shard in shards if (name := name_in(shard.path))}
        own = {shard.path: shard.size for shard in shards if not name_in(shard.path)}
        check_whole(store, own, root=ROOT, before=task.before, prefix="shards/")
        manifest, blobs = _manifest(whole, shards, _parts(whole, written), task.tag)
        if blobs:
            store.put(blobs_path(task.tag), blobs)
        text = dumps(manifest)
        if self._lease is not None:
            self._lease.confirm(shared)
        store.put(ROOT, text, if_absent=task.before is None, if_match=task.before)
        if task.ground is not None:
            task.ground.clear(store, partial(_LOG.warning, _LEFT, store.url))
        self._release()
        return sum(shard.size for shard in shards) - sum(one.reused for one in written) + len(blobs) + len(text)

    def discard(self, task: Task) -> None:
        """Remove a rank's shards, and what rank 0 puts beside, unless there is a checkpoint that may need them."""
        self._release()
        with suppress(UcpError):
            if not unchanged(task.store, ROOT, task.before):
                return
            for path in [
                *(file.path for file in _files(task, task.plan.write)),
                *([] if task.rank else [blobs_path(task.tag)]),
            ]:
                task.store.delete(path)

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()


def _files(task: Task, write: Sequence[Cut]) -> Iterator[ShardFile]:
    return shard_files(task.rank, [cut.piece for cut in write], tag=task.tag)


def _write_file(task: Task, file: ShardFile, cuts: Mapping[Piece, Cut], done: Written) -> None:
    with task.store.create(file.path, file.size) as writer:
        writer.write_at(0, file.header)
        for piece, start in file.offsets():
            at, digests = start, []
            for block in blocks(task.snapshot.tensor(cuts[piece])):
                digests.append(crc32c(block))
                writer.write_at(at, block)
                at += len(block)
            if cuts[piece].compare == "crc32c":
                task.digests[piece] = tuple(digests)
            done.parts.append((piece.key, Part(piece.box, file.path, start, tuple(digests))))
    done.shards.append(Shard(file.path, file.size, len(file.header), crc32c(file.header)))


def _parts(whole: Whole, written: Sequence[Written]) -> dict[Key, tuple[Part, ...]]:
    parts: dict[Key, list[Part]] = {
        Key(name, state): [] for name, tensor in whole.tensors.items() for state in tensor.states
    }
    for key, part in (pair for one in written for pair in one.parts):
        parts[key].append(part)
    return {key: tuple(sorted(held, key=lambda part: part.box.start)) for key, held in parts.items()}


def _manifest(
    whole: Whole, shards: tuple[Shard, ...], parts: Mapping[Key, tuple[Part, ...]], tag: str
) -> tuple[NativeManifest, bytes]:
    """The manifest, and the tensors of the training state that it tells of."""
    encoder = Encoder(_no_leaf)
    groups: list[Json] = [
        {"params": names, "options": encoder.encode(options, where="param_groups")} for names, options in whole.groups
    ]
    state = {name: encoder.encode(tree, where=name) for name, tree in whole.state.items()}
    blobs, table = encoder.blobs()
    path = blobs_path(tag)
    manifest = NativeManifest(
        id=str(uuid.uuid4()),
        created_by=f"ucp {version('universal-checkpoint')}",
        step=whole.step,
        source=Source("torch", torch.__version__, whole.mesh),
        shards=shards,
        tensors=tuple(whole.tensors.values()),
        parts=parts,
        ties=whole.ties,
        groups=groups,
        state=state,
        blobs=table,
        files={path: File(path, len(blobs), crc32c(blobs))} if blobs else {},
        spreads=whole.spreads,
    )
    return manifest, blobs


def _no_leaf(_: object) -> bytes:
    raise FitError("a tensor that is not in memory cannot be saved")
