"""Saving a running job: every rank writes its own shards, each box once, and rank 0 the manifest, last.

Normative text of what is written: spec/shard-format.md.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from crc32c import crc32c

from ucp.catalog import Source, Tensor
from ucp.errors import ConflictError, FitError
from ucp.format.documents import Json
from ucp.format.native_manifest import BLOCK_BYTES, ROOT, NativeManifest, Part, Shard, dumps
from ucp.format.native_shard import Piece, ShardFile, shard_files
from ucp.format.records import BLOBS, File
from ucp.format.state import Encoder
from ucp.layout import Mesh
from ucp.plan import Cover, Extent, Fragment, Key
from ucp.store import Store, open_store
from ucp.train.inventory import Inventory, Memory, take_inventory
from ucp.train.team import Team


@dataclass(slots=True)
class Written:
    """What one rank wrote, and the block digests of everything it holds."""

    shards: list[Shard] = field(default_factory=list)
    parts: list[tuple[Key, Part]] = field(default_factory=list)
    digests: dict[Piece, tuple[int, ...]] = field(default_factory=dict)


def save(state: Any, url: str, *, step: int | None = None) -> None:
    """Save what the ranks of this job hold together as one checkpoint at `url`. Collective: every rank calls it.

    `state` is what `ucp.load` fills: a module, ``(module, optimizer)``, a dict ``name: tensor``, or a dict of these
    under ``model``, ``optimizer`` and ``lr_scheduler``. DTensors (FSDP2, TP, 2-D meshes) are saved as the shards they
    are. A plain tensor is the same on all ranks that hold one of its name, as under DistributedDataParallel; of a
    buffer, the lowest rank's copy is taken. `step` is the number of optimizer steps done.

    When it returns, the checkpoint is complete. If anything fails on any rank, all ranks raise and there is none:
    FitError for what cannot be saved, ConflictError for replicas that differ and for a `url` that holds a checkpoint
    already, StorageError where writing fails or a rank is gone.
    """
    store, team, memory = open_store(url), Team(url), Memory()
    lead = _Lead(store, step)
    mine = team.round(lambda: take_inventory(state, memory), lead.assign)
    team.round(lambda: _write(store, team.rank, mine, memory), lead.commit)


def _write(store: Store, rank: int, mine: Sequence[Piece], memory: Memory) -> Written:
    """Write the pieces assigned to this rank, and digest the others that it holds."""
    done = Written()
    for file in shard_files(rank, mine):
        _write_file(store, file, memory, done)
    for piece in memory.keys() - done.digests.keys():
        done.digests[piece] = tuple(crc32c(block) for block in _blocks(memory[piece]))
    return done


def _write_file(store: Store, file: ShardFile, memory: Memory, done: Written) -> None:
    with store.create(file.path, file.size) as writer:
        writer.write_at(0, file.header)
        for piece, start in file.offsets():
            at, digests = start, []
            for block in _blocks(memory[piece]):
                writer.write_at(at, block)
                digests.append(crc32c(block))
                at += len(block)
            done.digests[piece] = tuple(digests)
            done.parts.append((piece.key, Part(piece.box, file.path, start, tuple(digests))))
    done.shards.append(Shard(file.path, file.size, len(file.header), crc32c(file.header)))


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of `tensor` in C order, BLOCK_BYTES at a time."""
    flat = tensor.reshape(-1)
    step = BLOCK_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy().data


@dataclass(slots=True)
class _Lead:
    """Rank 0's part: say who writes what, then make the checkpoint exist."""

    store: Store
    step: int | None
    inventories: Sequence[Inventory] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def assign(self, inventories: Sequence[Inventory]) -> list[list[Piece]]:
        """The pieces that each rank writes: every box once, the bytes spread evenly over the ranks that hold it."""
        if self.store.exists(ROOT):
            raise ConflictError(f"{self.store.url}: already holds a checkpoint", hint="save to another place")
        self.inventories, self.tensors = inventories, _merged(inventories)
        holders: dict[Piece, list[int]] = defaultdict(list)
        for rank, inventory in enumerate(inventories):
            for piece in inventory.pieces:
                holders[piece].append(rank)
        _check_cover(self.tensors, holders)
        assigned: list[list[Piece]] = [[] for _ in inventories]
        loads = [0] * len(inventories)
        for piece in sorted(holders, key=lambda piece: (len(holders[piece]) > 1, -piece.nbytes)):
            able = holders[piece][:1] if self._is_buffer(piece) else holders[piece]
            rank = min(able, key=loads.__getitem__)
            assigned[rank].append(piece)
            loads[rank] += piece.nbytes
        return assigned

    def commit(self, written: Sequence[Written]) -> list[None]:
        """Compare replicas, then put the manifest: from then on there is a checkpoint."""
        self._compare(written)
        parts: dict[Key, list[Part]] = {
            Key(name, state): [] for name, tensor in self.tensors.items() for state in tensor.states
        }
        for key, part in (pair for rank in written for pair in rank.parts):
            parts[key].append(part)
        shards = tuple(shard for rank in written for shard in rank.shards)
        self.store.put(ROOT, dumps(self._manifest(shards, parts)), if_absent=True)
        return [None for _ in written]

    def _manifest(self, shards: tuple[Shard, ...], parts: Mapping[Key, Sequence[Part]]) -> NativeManifest:
        encoder = Encoder(_no_leaf)
        groups: list[Json] = [
            {"params": names, "options": encoder.encode(options, where="param_groups")}
            for names, options in _merged_groups(self.inventories)
        ]
        first, world = self.inventories[0], len(self.inventories)
        state = {name: encoder.encode(tree, where=name) for name, tree in first.state.items()}
        blobs, table = encoder.blobs()
        if blobs:
            self.store.put(BLOBS, blobs)
        fits = Mesh(first.axes).size == world
        return NativeManifest(
            id=str(uuid.uuid4()),
            created_by=f"ucp {version('universal-checkpoint')}",
            step=self.step,
            source=Source("torch", torch.__version__, Mesh(first.axes if fits else {"rank": world})),
            shards=shards,
            tensors=tuple(self.tensors.values()),
            parts={key: tuple(sorted(held, key=lambda part: part.box.start)) for key, held in parts.items()},
            ties={alias: name for inventory in self.inventories for alias, name in inventory.ties.items()},
            groups=groups,
            state=state,
            blobs=table,
            files={BLOBS: File(BLOBS, len(blobs), crc32c(blobs))} if blobs else {},
        )

    def _compare(self, written: Sequence[Written]) -> None:
        seen: dict[Piece, tuple[int, tuple[int, ...]]] = {}
        for rank, one in enumerate(written):
            for piece, digests in one.digests.items():
                first, expected = seen.setdefault(piece, (rank, digests))
                if digests != expected and not self._is_buffer(piece):
                    raise ConflictError(
                        f"{piece.key}: ranks {first} and {rank} hold different values of the same elements",
                        hint="the ranks have drifted apart, or hold different tensors under one name",
                    )

    def _is_buffer(self, piece: Piece) -> bool:
        return self.tensors[piece.key.name].kind == "buffer"


def _merged(inventories: Sequence[Inventory]) -> dict[str, Tensor]:
    """The tensors of all ranks; ConflictError where two ranks say different things of one."""
    merged: dict[str, Tensor] = {}
    for rank, inventory in enumerate(inventories):
        for name, tensor in inventory.tensors.items():
            known = merged.setdefault(name, tensor)
            if known != tensor:
                raise ConflictError(f"{name}: rank {rank} has {_told(tensor)}, a rank before it {_told(known)}")
    return merged


def _told(tensor: Tensor) -> str:
    states = [f"{state} {spec.dtype}{list(spec.shape)}" for state, spec in tensor.states.items()]
    scalars = [f"{name} {scalar.value}" for name, scalar in tensor.scalars.items()]
    return ", ".join([tensor.kind, *states, *scalars])


def _check_cover(tensors: Mapping[str, Tensor], pieces: Mapping[Piece, object]) -> None:
    """FitError, before anything is written, unless the ranks' boxes hold every element of every tensor once."""
    held: dict[Key, list[Fragment]] = defaultdict(list)
    for piece in pieces:
        held[piece.key].append(Fragment(piece.box, Extent.contiguous("a rank", 0, piece.box.shape, piece.dtype)))
    for name, tensor in tensors.items():
        for state, spec in tensor.states.items():
            Cover.of(Key(name, state), spec, held[Key(name, state)])


def _merged_groups(inventories: Sequence[Inventory]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Groups by number, with the parameters of all ranks: those of a pipeline's stages differ."""
    for number in range(max(len(inventory.groups) for inventory in inventories)):
        groups = [inventory.groups[number] for inventory in inventories if number < len(inventory.groups)]
        if any(options != groups[0][1] for _, options in groups):
            raise ConflictError(f"group {number} of the optimizer has different hyper-parameters on different ranks")
        yield list(dict.fromkeys(name for names, _ in groups for name in names)), groups[0][1]


def _no_leaf(_: object) -> bytes:
    raise FitError("a tensor that is not in memory cannot be saved")
