"""What the ranks of the tests of exchanging run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

import ucp
from tests.train.handmade import Counting
from ucp.checkpoint import Checkpoint
from ucp.layout import Box, FlatRange, Shape
from ucp.plan import Extent, Fragment, Key
from ucp.train.crew import Crew
from ucp.train.exchange import fill_together, meet
from ucp.train.exchange.shared import Segments
from ucp.train.held import Held, flat_held, in_parts
from ucp.train.shards import Part
from ucp.train.transfer import Fill


class Got(NamedTuple):
    """What a rank has after a load: what is wrong, bytes that it read and wanted, and what it has from others."""

    wrong: list[str]
    read: int
    wanted: int
    received: int


def _fill(store: Counting, ckpt: Checkpoint, fills: Sequence[Fill], *, messages: bool, **options: Any) -> int:
    if messages:
        # As between machines.
        Segments.of = lambda *_: None  # type: ignore[method-assign]
    meeting = meet(Crew.everybody(), lambda: (ckpt.url, fills))
    return fill_together(meeting, store, workers=2, record=lambda *_: None, **{"replicas": False, **options})


def boxes_of(shape: Shape, cut: str, rank: int, world: int) -> Box | FlatRange | None:
    """What a rank wants: everything, its rows, columns or elements, or nothing."""
    if cut == "none":
        return None
    if cut == "all" or not shape:
        return Box.whole(shape)
    if cut == "elements":
        size = torch.Size(shape).numel()
        a, b = size * rank // world, size * (rank + 1) // world
        return FlatRange(a, b - a)
    dim = {"rows": 0, "columns": len(shape) - 1}[cut]
    a, b = shape[dim] * rank // world, shape[dim] * (rank + 1) // world
    start = tuple(a if d == dim else 0 for d in range(len(shape)))
    return Box(start, tuple(b - a if d == dim else n for d, n in enumerate(shape)))


def held_of(shape: Shape, region: Box | FlatRange | None, dtype: torch.dtype) -> Held:
    if region is None:
        return Held(shape, torch.full((0,), 9, dtype=dtype), ())
    if isinstance(region, FlatRange):
        memory = torch.full((region.length + 3,), 9, dtype=dtype)
        return flat_held(shape, memory, [(region.start, 2, region.length)])
    # Memory with gaps, as a shard of a larger one may be.
    memory = torch.full((*region.shape, 2), 9, dtype=dtype)[..., 0] if region.shape else torch.full((), 9, dtype=dtype)
    return in_parts(shape, memory, [Part(region, Box((0,) * len(shape), region.shape))])


def mixed(rank: int, world: int, ckpt: Checkpoint, seeds: int, memory: int, messages: bool) -> list[Got]:
    return [_mixed(rank, world, ckpt, seed, memory, messages) for seed in range(seeds)]


def _mixed(rank: int, world: int, ckpt: Checkpoint, seed: int, memory: int, messages: bool) -> Got:
    """Every tensor cut in another way, the same on all ranks, some of which want nothing of it."""
    choose, own = random.Random(seed), random.Random(seed * 100 + rank)
    store, fills, checks, wanted = Counting(ckpt.store), [], [], 0
    for name, tensor in ckpt.catalog.tensors.items():
        for state, spec in tensor.states.items():
            cut = choose.choice(["all", "rows", "columns", "elements"])
            region = boxes_of(spec.shape, cut if own.random() < 0.8 else "none", rank, world)
            dtype = getattr(torch, spec.dtype)
            held = held_of(spec.shape, region, torch.float64 if choose.random() < 0.3 else dtype)
            fills.append(Fill(held, ckpt.catalog.cover(name, state)))
            checks.append((f"{name}[{state}] {cut}", ckpt[name][state][...], held))
            wanted += sum(box.size for box, _ in held.views()) * dtype.itemsize
    received = _fill(store, ckpt, fills, memory=memory, messages=messages)
    wrong = [label for label, truth, held in checks if not right(truth, held)]
    return Got(wrong, store.bytes_read, wanted, received)


def right(truth: Tensor, held: Held) -> bool:
    return all(
        torch.equal(view, truth[tuple(map(slice, box.start, box.stop))].to(view.dtype)) for box, view in held.views()
    )


def same(rank: int, world: int, ckpt: Checkpoint, cut: str, memory: int, messages: bool) -> Got:
    """Every tensor cut in the same way."""
    store, fills, checks, wanted = Counting(ckpt.store), [], [], 0
    for name, tensor in ckpt.catalog.tensors.items():
        for state, spec in tensor.states.items():
            # What has no such dim is rank 0's.
            region = boxes_of(spec.shape, cut if spec.shape or cut == "all" or rank == 0 else "none", rank, world)
            held = held_of(spec.shape, region, getattr(torch, spec.dtype))
            fills.append(Fill(held, ckpt.catalog.cover(name, state)))
            checks.append((f"{name}[{state}]", ckpt[name][state][...], held))
            wanted += sum(box.size for box, _ in held.views()) * held.memory.element_size()
    received = _fill(store, ckpt, fills, memory=memory, messages=messages)
    return Got([label for label, truth, held in checks if not right(truth, held)], store.bytes_read, wanted, received)


def _room(ckpt: Checkpoint) -> dict[str, dict[str, Tensor]]:
    return {
        name: {state: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for state, spec in held.states.items()}
        for name, held in ckpt.catalog.tensors.items()
    }


def _said(load: Callable[[], Any]) -> str:
    try:
        load()
    except ucp.UcpError as error:
        return f"{type(error).__name__}: {error} ({error.hint})"
    return "nothing"


def loaded_whole(rank: int, world: int, ckpt: Checkpoint) -> str:
    return _said(lambda: ucp.load(_room(ckpt), ckpt))


def with_replica(ckpt: Checkpoint, *, same: bool) -> Checkpoint:
    """A checkpoint that has a further copy of t5, the same or not."""
    key = Key("t5", "value")
    (fragment,) = ckpt.catalog.fragments[key]
    data = bytearray(ckpt.store.read(fragment.extent.object, fragment.extent.offset, fragment.extent.nbytes))
    data[-1] ^= not same
    ckpt.store.put("copy.bin", bytes(data))
    extent = Extent.contiguous("copy.bin", 0, fragment.extent.shape, fragment.extent.dtype)
    fragments = {**ckpt.catalog.fragments, key: (fragment, Fragment(fragment.region, extent, replica=1))}
    return Checkpoint(replace(ckpt.catalog, fragments=fragments), ckpt.store)


class _Failing(Counting):
    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        raise ucp.StorageError(f"{path}: no such disk")


def one_cannot_read(rank: int, world: int, ckpt: Checkpoint) -> str:
    store = _Failing(ckpt.store) if rank == 1 else ckpt.store
    return _said(lambda: ucp.load(_room(ckpt), replace(ckpt, store=store), memory=4 << 10))


def narrowed(rank: int, world: int, ckpt: Checkpoint) -> str:
    return _said(lambda: ucp.load({"w": torch.zeros(2, dtype=torch.float16)}, ckpt))


def different(rank: int, world: int, sources: Sequence[Checkpoint], together: bool | None) -> str:
    target = torch.full((3,), 9.0)
    said = _said(lambda: ucp.load({"w": target}, sources[rank], together=together))
    return str(target.tolist()) if said == "nothing" else said


def only_rank_0(rank: int, world: int, ckpt: Checkpoint) -> int:
    return ucp.load(_room(ckpt), ckpt, together=False, verify=False).bytes_read if rank == 0 else 0


def in_pairs(rank: int, world: int, ckpt: Checkpoint) -> int:
    """Each half of the ranks loads for itself; what this rank read."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    room = _room(ckpt)
    report = ucp.load(room, ckpt, together=groups[rank // 2], verify=False, memory=64 << 10)
    assert all(torch.equal(room[name]["value"], ckpt[name]["value"][...]) for name in room)
    assert report.bytes_of_job == ckpt.catalog.nbytes
    return report.bytes_read
