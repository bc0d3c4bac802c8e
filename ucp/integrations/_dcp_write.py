"""A rank's part of a save: its tensors as shards of the native form, everything small on its way to the coordinator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from crc32c import crc32c
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from ucp.errors import FitError, UsageError
from ucp.format.native_manifest import BLOCK_BYTES, Part, Shard
from ucp.format.native_shard import Piece, ShardFile, shard_files
from ucp.integrations._dcp_sort import Role, TensorRole
from ucp.layout import Box, Shape
from ucp.plan import Key
from ucp.store import Store
from ucp.train.save.digest import as_bytes
from ucp.train.shards import dtype_name, local_tensor
from ucp.train.state.live import tree_of
from ucp.tree import Tree


@dataclass(frozen=True, slots=True)
class Written:
    """One item as it was written: a part of a shard, or, where there is none, its `value`; an empty box has neither."""

    role: Role
    rank: int
    shape: Shape = ()
    dtype: str = ""
    part: Part | None = None
    shard: Shard | None = None
    value: Tree = None


def write_items(store: Store, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
    """Write the tensors of `plan` to shards of this rank, durably; the results carry their places and digests.

    FitError for objects that are no plain values, StorageError where writing fails.
    """
    rank, roles = plan.storage_data
    pieces: dict[Piece, WriteItem] = {}
    results = []
    for item in plan.items:
        role = roles[item.index.fqn]
        if item.tensor_data is None or not isinstance(role, TensorRole) or role.number:
            value = _value(item, planner)
            results.append(WriteResult(item.index, 0, Written(role, rank, value=value)))
        else:
            pieces[_piece(item, role)] = item
    results += [_result(item, roles, rank, piece, None, None) for piece, item in pieces.items() if not piece.nbytes]
    paths = []
    for file in shard_files(rank, [piece for piece in pieces if piece.nbytes]):
        paths.append(file.path)
        shard, parts = _write_file(store, file, pieces, planner)
        results += [_result(pieces[piece], roles, rank, piece, shard, part) for piece, part in parts.items()]
    store.flush(paths)
    return results


def _piece(item: WriteItem, role: TensorRole) -> Piece:
    data = item.tensor_data
    assert data is not None
    box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    return Piece(Key(role.name, role.state), dtype_name(data.properties.dtype), box)


def _result(
    item: WriteItem, roles: Mapping[str, Role], rank: int, piece: Piece, shard: Shard | None, part: Part | None
) -> WriteResult:
    assert item.tensor_data is not None
    shape = tuple(item.tensor_data.size)
    return WriteResult(item.index, piece.nbytes, Written(roles[item.index.fqn], rank, shape, piece.dtype, part, shard))


def _write_file(
    store: Store, file: ShardFile, pieces: Mapping[Piece, WriteItem], planner: SavePlanner
) -> tuple[Shard, dict[Piece, Part]]:
    parts = {}
    with store.create(file.path, file.size) as writer:
        writer.write_at(0, file.header)
        for piece, start in file.offsets():
            at, digests = start, []
            for block in _blocks(_tensor(pieces[piece], planner, piece)):
                writer.write_at(at, block)
                digests.append(crc32c(block))
                at += len(block)
            parts[piece] = Part(piece.box, file.path, start, tuple(digests))
    return Shard(file.path, file.size, len(file.header), crc32c(file.header)), parts


def _tensor(item: WriteItem, planner: SavePlanner, piece: Piece) -> torch.Tensor:
    """What the planner has for an item; FitError if that is not what it planned."""
    resolved = planner.resolve_data(item)
    assert isinstance(resolved, torch.Tensor)
    tensor = local_tensor(resolved, str(piece.key))
    if tuple(tensor.shape) != piece.box.shape or dtype_name(tensor.dtype) != piece.dtype:
        raise FitError(
            f"{piece.key}: the planner planned {piece.dtype}{list(piece.box.shape)} and has "
            f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
        )
    return tensor


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of `tensor` in C order, BLOCK_BYTES at a time."""
    flat = tensor.reshape(-1)
    step = BLOCK_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        yield as_bytes(flat[start : start + step])


def _value(item: WriteItem, planner: SavePlanner) -> Tree:
    key = item.index.fqn
    if item.tensor_data is not None:
        return tree_of(planner.resolve_data(item), key)
    lookup: Any = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise UsageError(
            f"{key}: {type(planner).__name__} has no lookup_object",
            hint="derive it from torch.distributed.checkpoint.DefaultSavePlanner",
        )
    value = lookup(item.index)
    _check_whole(value, key)
    return tree_of(value, key)


def _check_whole(value: Any, key: str) -> None:
    """FitError for tensors in pieces inside an object, of which every rank has another part."""
    if isinstance(value, DTensor | ShardedTensor):
        raise FitError(
            f"{key}: a tensor in pieces inside an object that is saved as a whole",
            hint="let the planner flatten the state dict, and keep tensors in dicts or lists",
        )
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            _check_whole(one, key)
