"""What a rank shares with the checkpoints before and after: files that are the same from save to save, in the pool.

Frozen parameters and buffers get files of their own, and so does what did not change since the last save of this
process. Content alone decides what is stored: each file is put together in memory and hashed before anything is
written, and one that is there is not written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from crc32c import crc32c

from ucp.catalog import Tensor
from ucp.format.native_manifest import Part, Shard
from ucp.format.native_shard import Piece, ShardFile, shared_files
from ucp.format.pool import POOL, content_name, path_of
from ucp.plan import Key
from ucp.share.lease import Lease, Offer, put_shared
from ucp.store import Store
from ucp.train.save.digest import blocks
from ucp.train.save.form import Task
from ucp.train.save.plan import Cut, slabs

_REMEMBERED_BYTES = 256 << 10
"""Smaller trained pieces are written with the others, changed or not: a file of their own would not pay."""

_WORKERS = 4

_LAST: dict[str, dict[Piece, tuple[int, ...]]] = {}
"""Digests of the trained pieces of this process's last save to a run, by the URL of its pool."""


@dataclass(frozen=True, slots=True)
class SharedBrief:
    """What every rank is told of a save that shares: what the pool offers, and what is expected to stay as it is."""

    offer: Offer
    frozen: frozenset[str]
    buffers: frozenset[str]

    @classmethod
    def of(cls, lease: Lease, tensors: Mapping[str, Tensor]) -> SharedBrief:
        """The brief under a lease."""
        frozen = frozenset(name for name, tensor in tensors.items() if tensor.kind == "frozen")
        return cls(lease.offer, frozen, frozenset(name for name, tensor in tensors.items() if tensor.kind == "buffer"))


@dataclass(slots=True)
class Sharing:
    """What a rank has put into the pool, or found there: shards, their parts, and the bytes that were not written.

    `left` is what the rank is to write into files of the checkpoint.
    """

    shards: list[Shard] = field(default_factory=list)
    parts: list[tuple[Key, Part]] = field(default_factory=list)
    reused: int = 0
    left: list[Cut] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Made:
    """A file that lies in the pool under `name`, and the digests of its pieces; `reused` if it was there."""

    name: str
    digests: Mapping[Piece, tuple[int, ...]]
    reused: bool


def write_shared(task: Task) -> Sharing:
    """Put what is expected to stay as it is into the pool, durably."""
    brief, pool = task.brief, task.store.sibling(POOL)
    known, found = _LAST.get(pool.url, {}), Sharing()
    groups: dict[str, list[Cut]] = {"frozen": [], "buffers": []}
    for cut in task.plan.write:
        name = cut.piece.key.name
        if name in brief.frozen or name in brief.buffers:
            groups["frozen" if name in brief.frozen else "buffers"].append(cut)
        elif _unchanged(task, cut, known.get(cut.piece)):
            groups[str(cut.piece)] = [cut]
        else:
            found.left.append(cut)
    with ThreadPoolExecutor(max(1, min(_WORKERS, pool.parallel)), thread_name_prefix="ucp-share") as workers:
        for cuts in groups.values():
            _share(task, pool, cuts, found, workers)
    return found


def remember(task: Task, found: Sharing, parts: Iterable[tuple[Key, Part]]) -> None:
    """Keep the digests of trained pieces that were written, by which the next save sees what has not changed."""
    url = task.store.sibling(POOL).url
    written = {(key, part.box): part.crc32c for key, part in parts}
    known, left = _LAST.get(url, {}), {cut.piece for cut in found.left}
    kept = {piece: known[piece] for cut in task.plan.write if (piece := cut.piece) in known and piece not in left}
    fresh = {
        piece: written[piece.key, piece.box]
        for piece in left
        if piece.nbytes >= _REMEMBERED_BYTES and (piece.key, piece.box) in written
    }
    _LAST[url] = kept | fresh


def _unchanged(task: Task, cut: Cut, digests: tuple[int, ...] | None) -> bool:
    """Whether a piece seems to be what it was: known by the first block of those that changed."""
    if digests is None:
        return False
    now = (crc32c(block) for block in blocks(task.snapshot.tensor(cut)))
    return all(value == known for value, known in zip(now, digests, strict=True))


def _share(task: Task, pool: Store, cuts: Sequence[Cut], found: Sharing, workers: ThreadPoolExecutor) -> None:
    """Files of `cuts`. The cuts of those that must not lie in the pool now are left, to be written as others are."""
    of = {slab: cut for cut in cuts for slab in slabs(cut.piece)}
    files = list(shared_files(list(of)))
    made = list(workers.map(lambda file: _place(task, pool, file, of), files))
    members = [{of[piece].piece for piece in file.pieces} for file in files]
    refused = {piece for one, held in zip(made, members, strict=True) if one is None for piece in held}
    while more := {piece for held in members if held & refused for piece in held} - refused:
        refused |= more  # a cut in several files is written as a whole, one way or the other
    for file, one, held in zip(files, made, members, strict=True):
        if one is not None and not held & refused:
            _note(task, file, one, of, found)
    found.left += [cut for cut in cuts if cut.piece in refused]


def _place(task: Task, pool: Store, file: ShardFile, of: Mapping[Piece, Cut]) -> _Made | None:
    """Put one file together, and into the pool if it is not there; None where it may not lie there now."""
    data, digests = bytearray(file.size), {}
    data[: len(file.header)] = file.header
    for piece, start in file.offsets():
        at, values = start, []
        for block in blocks(_tensor(task, piece, of[piece])):
            data[at : at + len(block)] = block
            values.append(crc32c(block))
            at += len(block)
        digests[piece] = tuple(values)
    name, offer = content_name(data), task.brief.offer
    if not offer.takes(name):
        return None
    reused = offer.has(pool, name, len(data))
    if not reused:
        put_shared(pool, data, name)
    return _Made(name, digests, reused)


def _tensor(task: Task, slab: Piece, cut: Cut) -> torch.Tensor:
    tensor = task.snapshot.tensor(cut)
    return tensor if slab == cut.piece else tensor[Cut(slab, cut.piece).slices]


def _note(task: Task, file: ShardFile, made: _Made, of: Mapping[Piece, Cut], found: Sharing) -> None:
    path = path_of(made.name)
    for piece, start in file.offsets():
        found.parts.append((piece.key, Part(piece.box, path, start, made.digests[piece])))
        if of[piece].compare == "crc32c":
            task.digests[piece] = made.digests[piece]
    found.shards.append(Shard(path, file.size, len(file.header), crc32c(file.header)))
    found.reused += file.size if made.reused else 0


__all__ = ["SharedBrief", "Sharing", "remember", "write_shared"]
