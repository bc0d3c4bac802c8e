"""Which boxes of a whole tensor this rank holds, and where they lie in its local tensor."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ucp.errors import FitError
from ucp.layout import Box, Shape

Runs = list[tuple[int, int]]
"""Indices of one dim that a rank holds: (start, length) of each run, in the order of the local tensor."""


@dataclass(frozen=True, slots=True)
class Part:
    """Box `region` of the whole tensor is box `local` of this rank's tensor."""

    region: Box
    local: Box


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def local_tensor(tensor: torch.Tensor, label: str) -> torch.Tensor:
    """The memory of this rank's part of `tensor`, without autograd: writes to it change `tensor`.

    FitError for what has no plain memory: meta tensors, sparse and quantized ones, other tensor subclasses.
    """
    local = plain_of(tensor)
    if local.is_meta:
        raise FitError(
            f"{label}: is on the meta device, where it has no memory",
            hint="call module.to_empty(device=...), then make its non-persistent buffers anew",
        )
    if type(local) is not torch.Tensor or local.layout != torch.strided or local.is_quantized:
        raise FitError(f"{label}: cannot be filled in place, it is a {type(local).__name__} of layout {local.layout}")
    return local


def plain_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of `tensor`, without autograd, whatever it is."""
    # Without autograd a DTensor gives its local tensor as it is, which is many times faster.
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


_FOUND: dict[Hashable, list[Part]] = {}
"""Parts by placements and shapes: a model has few different ones, and asking torch for all would take long."""


def parts(tensor: torch.Tensor, label: str) -> list[Part]:
    """The boxes of `tensor` that this rank holds, from its placements if it is a DTensor; none on an empty shard.

    Cuts are those of ``torch.chunk`` (torch/distributed/tensor/placement_types.py, ``Shard``), and of
    ``_StridedShard`` where FSDP cut what tensor parallelism had already cut. FitError for partial placements, and
    wherever torch's own chunk list or the local tensor's shape say otherwise.
    """
    if not isinstance(tensor, DTensor):
        whole = Box.whole(tuple(tensor.shape))
        return [Part(whole, whole)] if whole.size else []
    if any(placement.is_partial() for placement in tensor.placements):
        raise FitError(f"{label}: has partial placements {tensor.placements}", hint="redistribute it before loading")
    # A strided shard claims to equal a plain one.
    cuts = tuple((type(p), getattr(p, "dim", None), getattr(p, "split_factor", 1)) for p in tensor.placements)
    key = (tensor.device_mesh, cuts, tuple(tensor.shape), tuple(plain_of(tensor).shape))
    known = _FOUND.get(key)
    if known is None:
        known = _FOUND[key] = _placed(tensor, label)
    return known


def _placed(tensor: DTensor, label: str) -> list[Part]:
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    runs = [_runs(tensor, dim, coordinate) for dim in range(tensor.ndim)]
    _check(tensor, runs, label)
    return _parts(runs)


def _runs(tensor: DTensor, dim: int, coordinate: Sequence[int]) -> Runs:
    """Placements cut the dim from the first mesh axis to the last, each what the one before left."""
    runs: Runs = [(0, tensor.shape[dim])]
    for axis, placement in enumerate(tensor.placements):
        if getattr(placement, "dim", None) == dim:
            chunks, index = tensor.device_mesh.size(axis), coordinate[axis]
            runs = cut(runs, chunks, index, getattr(placement, "split_factor", 1))
    return runs


def cut(runs: Runs, chunks: int, index: int, split_factor: int = 1) -> Runs:
    """What chunk `index` of `chunks` keeps of `runs`, which are first split in `split_factor` equal pieces."""
    total = sum(length for _, length in runs)
    kept: Runs = []
    for piece in range(split_factor):
        first, last = _chunk(total, split_factor, piece)
        start, stop = _chunk(last - first, chunks, index)
        kept += _take(runs, first + start, first + stop)
    return _joined(kept)


def _chunk(size: int, chunks: int, index: int) -> tuple[int, int]:
    """``torch.chunk``: all chunks but the last ones have ceil(size / chunks) elements."""
    full = -(-size // chunks)
    return min(size, full * index), min(size, full * (index + 1))


def _take(runs: Runs, start: int, stop: int) -> Runs:
    taken: Runs = []
    at = 0
    for first, length in runs:
        a, b = max(start, at), min(stop, at + length)
        if a < b:
            taken.append((first + a - at, b - a))
        at += length
    return taken


def _joined(runs: Runs) -> Runs:
    joined: Runs = []
    for start, length in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined


def _parts(runs: Sequence[Runs]) -> list[Part]:
    """Every combination of the dims' runs."""
    placed = []
    for dim in runs:
        ends = [0, *itertools.accumulate(length for _, length in dim)]
        placed.append([(start, length, at) for (start, length), at in zip(dim, ends, strict=False)])
    found = []
    for combination in itertools.product(*placed):
        shape = tuple(length for _, length, _ in combination)
        region = Box(tuple(start for start, _, _ in combination), shape)
        found.append(Part(region, Box(tuple(at for _, _, at in combination), shape)))
    return [part for part in found if part.region.size]


def _check(tensor: DTensor, runs: Sequence[Runs], label: str) -> None:
    shape: Shape = tuple(sum(length for _, length in dim) for dim in runs)
    local = tuple(tensor.to_local().shape)
    if local != shape and (0 not in local or 0 not in shape):
        raise FitError(
            f"{label}: this rank holds {list(local)} where placements {tensor.placements} say {list(shape)}",
            hint="its size does not divide the mesh in a way that its placements can describe",
        )
    if 0 in shape:
        return
    (chunk,) = _chunk_list(tensor)
    first = tuple(dim[0][0] for dim in runs)
    if tuple(chunk.sizes) != shape or tuple(chunk.offsets) != first:
        raise FitError(f"{label}: torch places this rank's shard at {chunk}, not {list(shape)} at {list(first)}")


def _chunk_list(tensor: DTensor) -> list[Any]:
    """What torch's distributed checkpoint goes by (torch/distributed/checkpoint/planner_helpers.py)."""
    chunks: list[Any] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return chunks
