"""The flat buffers of a distributed optimizer in a ``torch_dist`` checkpoint, whatever it is that they hold.

megatron/core/optimizer/distrib_optimizer.py. ``sharded_param_state_dp_reshardable``: for each model-parallel rank
(``dp_group_idx``), buffer and bucket one tensor per state. Each parameter, each padding before one and what each
data-parallel rank has of them is a chunk of its own, so chunks show where parameters start and end.
``sharded_param_state_dp_zero``: for each such rank one object with all buckets of a buffer joined.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from ucp.catalog import Checksum
from ucp.container.values import Reference
from ucp.errors import CorruptError, FitError
from ucp.plan import Extent
from ucp.tree import TensorLeaf, Tree

from .._dcp.metadata import Entry
from .dist import Dist
from .legacy_optimizer import by_dtype
from .local import flat

ALONE = "save it as fully_reshardable, which names the states"
_BUCKET = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_\((.+?), (.+?)\)"
    r"\.bucket_idx_(\d+)\.([^.]+)"
)
_OBJECT = re.compile(r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.(\w+)/shard_.+")


class Run(NamedTuple):
    """Elements ``[start, stop)`` of a bucket lie at `extent`."""

    start: int
    stop: int
    extent: Extent
    checksums: tuple[Checksum, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """One bucket: the runs of each state, in order, and its size, padding at its end left out."""

    size: int
    states: dict[str, list[Run]] = field(default_factory=dict)

    def edges(self) -> set[int]:
        """Where runs start and end: alike in all states."""
        return {edge for run in next(iter(self.states.values())) for edge in (run.start, run.stop)}

    def runs(self, state: str, start: int, stop: int) -> Iterator[tuple[int, Extent, tuple[Checksum, ...]]]:
        """Elements ``[start, stop)``: (first element, where a run of them lies, what checks its bytes)."""
        runs = self.states[state]
        for run in islice(runs, max(0, bisect_right(runs, start, key=lambda run: run.start) - 1), None):
            if run.start >= stop:
                return
            low, high = max(start, run.start), min(stop, run.stop)
            if low < high:
                yield low, flat(run.extent, low - run.start, high - run.start), run.checksums


@dataclass(slots=True)
class Buffer:
    """The buckets of one buffer: one dtype of one model chunk. `joined` ones are one, without padding between."""

    dtype: str
    buckets: dict[int, Bucket] = field(default_factory=dict)
    joined: bool = False


Buffers = dict[int, Buffer]
ByRank = dict[int, dict[int, Buffers]]
"""By optimizer, model-parallel rank and number of the buffer."""


def collect(dist: Dist) -> ByRank:
    """All buffers of a checkpoint.

    FitError for an optimizer state of another kind, CorruptError for buckets whose chunks leave holes.
    """
    held: ByRank = {}
    for key, entry in dist.metadata.tensors.items():
        match = _BUCKET.fullmatch(key)
        if match is None:
            if "optimizer." in key:
                raise FitError(f"{dist.where}: the optimizer keeps {key}, which this reader does not know")
            continue
        chained, rank, number, kind, _, bucket, state = match.groups()
        buffers = held.setdefault(int(chained or 0), {}).setdefault(int(rank), {})
        buffer = buffers.setdefault(int(number), Buffer(kind.removeprefix("torch.")))
        one = buffer.buckets.setdefault(int(bucket), Bucket(entry.shape[0]))
        one.states[state] = list(_runs(dist, key, entry, one))
    for key, chained, rank in objects(dist, "param_state"):
        held.setdefault(chained, {})[rank] = dict(enumerate(_joined(key, dist.blob(key), dist)))
    return held


def objects(dist: Dist, name: str) -> Iterator[tuple[str, int, int]]:
    """(key, optimizer, rank) of what each model-parallel rank saved under `name`."""
    for key in dist.metadata.blobs:
        match = _OBJECT.fullmatch(key)
        if match and match[3] == name:
            yield key, int(match[1] or 0), int(match[2])


def _runs(dist: Dist, key: str, entry: Entry, bucket: Bucket) -> Iterator[Run]:
    end = 0
    for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets):
        start, stop = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
        if start != end or len(entry.shape) != 1 or entry.shape[0] != bucket.size:
            raise CorruptError(f"{dist.where}: chunks of {key} leave a hole or overlap at element {end}")
        if chunk.stored is not None:
            extent, checksums = dist.items.tensor(chunk.stored, chunk.sizes, entry.dtype, key=key)
            yield Run(start, stop, extent, checksums)
        end = stop


def _joined(key: str, tree: Tree, dist: Dist) -> Iterator[Buffer]:
    """Buffers in the object that one rank gathered: the same as in ``distrib_optim.pt``."""
    if not isinstance(tree, Mapping) or not tree.get("buckets_coalesced"):
        raise FitError(f"{dist.where}: {key} is in the layout of before February 2024", hint=ALONE)
    checksums = dist.items.checksums(dist.metadata.blobs[key])
    for index in sorted(name for name in tree if isinstance(name, int)):
        for dtypes, tensors in by_dtype(tree[index], f"{dist.where}: {key}"):
            states = {str(state): leaf.extent for state, leaf in tensors.items() if isinstance(leaf, TensorLeaf)}
            told = dtypes[0] if isinstance(dtypes, tuple) and dtypes else None
            if not isinstance(told, Reference) or "param" not in states:
                raise CorruptError(f"{dist.where}: {key}: a buffer without dtype or masters")
            if any(not extent.is_contiguous or extent.shape != states["param"].shape for extent in states.values()):
                raise CorruptError(f"{dist.where}: {key}: states of a buffer that differ in shape")
            buffer = Buffer(told.name, joined=True)
            buffer.buckets[0] = Bucket(states["param"].size)
            for state, extent in states.items():
                own = tuple(c for c in checksums if c.offset <= extent.offset < c.offset + c.length)
                buffer.buckets[0].states[state] = [Run(0, extent.size, extent, own)]
            yield buffer
