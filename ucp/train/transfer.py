"""Moving bytes from a checkpoint into tensors of this rank: a few threads, bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ucp.errors import ConflictError, FitError
from ucp.layout import Box, itemsize
from ucp.layout import block as blocks
from ucp.layout.block import View
from ucp.plan import Cover, Extent, Fragment, Key, split
from ucp.run.gather import Record, gather, read_into
from ucp.store import Store
from ucp.train.held import Held

BLOCK_BYTES = 8 << 20
"""Bytes that a worker moves at a time, and the size of each of its buffers."""


@dataclass(frozen=True, slots=True)
class Fill:
    """Fill `held`, this rank's part of a tensor, from `cover`, which has the same shape.

    With `share`, a block of the tensor is filled, and is a part of the cover's tensor seen through a view. `twins` are
    further copies in the source that must be equal, bit for bit.
    """

    held: Held
    cover: Cover
    twins: tuple[Cover, ...] = ()
    share: Share | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """A block of a tensor of the job, in the coordinates of a view of a tensor of the source; None: all is padding."""

    view: View
    block: blocks.Block | None


@dataclass(frozen=True, slots=True)
class Block:
    """Fill `target`, a view of the final memory, with box `region` of `cover` seen through `view`."""

    target: torch.Tensor
    region: Box
    cover: Cover
    twins: tuple[Cover, ...]
    view: View
    replicas: bool

    @property
    def nbytes(self) -> int:
        """Bytes in the source's dtype."""
        return self.region.size * itemsize(self.cover.spec.dtype)


def transfer(store: Store, fills: Sequence[Fill], *, workers: int, record: Record, replicas: bool = True) -> None:
    """Carry out `fills`, as `carry` does, and with `replicas` compare further copies that the source holds."""
    settle(fills)
    carry(store, (block for fill in fills for block in _blocks(fill, replicas=replicas)), workers, record)


def settle(fills: Sequence[Fill]) -> None:
    """Wait for what devices still do to the memory that will be filled."""
    for device in {fill.held.memory.device for fill in fills}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def carry(store: Store, blocks: Iterator[Block], workers: int, record: Record) -> None:
    """Fill `blocks` with `workers` threads of at most five buffers of `BLOCK_BYTES` each.

    Further copies in the source are read too where a block says so, and ConflictError is raised where one differs.
    Calls `record` for every range read. The first error stops all workers and is raised.
    """
    queue = _Queue(blocks)
    threads = [threading.Thread(target=_work, args=(store, queue, record), daemon=True) for _ in range(workers - 1)]
    for thread in threads:
        thread.start()
    try:
        _work(store, queue, record)
    finally:
        queue.stop()
        for thread in threads:
            thread.join()
    if queue.error is not None:
        raise queue.error


def _blocks(fill: Fill, *, replicas: bool) -> Iterator[Block]:
    for region, target in regions(fill):
        yield from cut(Block(target, region, fill.cover, fill.twins, view_of(fill), replicas))


def cut(block: Block) -> Iterator[Block]:
    """`block` in blocks of at most `BLOCK_BYTES`."""
    for box in split(block.region, max(1, BLOCK_BYTES // itemsize(block.cover.spec.dtype))):
        here = box.relative_to(block.region.start)
        yield replace(block, target=block.target[tuple(map(slice, here.start, here.stop))], region=box)


def view_of(fill: Fill) -> View:
    """The view in whose coordinates the boxes of a fill are."""
    return fill.share.view if fill.share else View.plain(fill.cover.spec.shape)


def regions(fill: Fill) -> Iterator[tuple[Box, torch.Tensor]]:
    """Boxes of the source's tensor, in the fill's view, each with the memory that it goes to, in the same shape."""
    for region, here in fill.held.views():
        if fill.share is None:
            yield region, here
            continue
        if fill.share.block is None:
            return
        for block in blocks.clip(fill.share.block, fill.held.shape, region):
            at, strides = blocks.linear(block, here.stride())
            first = at - sum(a * stride for a, stride in zip(region.start, here.stride(), strict=True))
            yield block.box, here.as_strided(block.box.shape, strides, here.storage_offset() + first)


@dataclass(slots=True)
class _Queue:
    """Blocks handed out one at a time, until they end or a worker fails."""

    blocks: Iterator[Block]
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False

    def take(self) -> Block | None:
        with self.lock:
            return None if self.stopped else next(self.blocks, None)

    def fail(self, error: BaseException) -> None:
        with self.lock:
            self.error = self.error or error
            self.stopped = True

    def stop(self) -> None:
        with self.lock:
            self.stopped = True


def _work(store: Store, queue: _Queue, record: Record) -> None:
    buffers = _Buffers()
    try:
        while (block := queue.take()) is not None:
            _move(store, block, buffers, record)
        buffers.finish()
    except BaseException as error:  # noqa: BLE001  the caller's thread raises it
        queue.fail(error)


class _Buffers:
    """A worker's staging memory: two buffers in turn, so that a copy to a device overlaps with the next read."""

    def __init__(self) -> None:
        self._pairs: dict[bool, list[torch.Tensor]] = {}
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def take(self, nbytes: int, *, pinned: bool) -> torch.Tensor:
        """`nbytes` bytes that no copy reads any more."""
        self._turn = 1 - self._turn
        self._wait(self._turn)
        pair = self._pairs.setdefault(pinned, [torch.empty(0, dtype=torch.uint8)] * 2)
        if len(pair[self._turn]) < nbytes:
            pair[self._turn] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return pair[self._turn][:nbytes]

    def sent(self, device: torch.device) -> None:
        """A copy to `device` from the buffer taken last has begun."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        self._events[self._turn] = event

    def finish(self) -> None:
        """Wait for all copies."""
        self._wait(0)
        self._wait(1)

    def _wait(self, turn: int) -> None:
        event, self._events[turn] = self._events[turn], None
        if event is not None:
            event.synchronize()


def _move(store: Store, block: Block, buffers: _Buffers, record: Record) -> None:
    target = block.target
    dtype: torch.dtype = getattr(torch, block.cover.spec.dtype)
    if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
        view = _bytes(target)
        _read(store, block.cover, block, view, record)
        _compare(store, block, view, record)
        return
    cuda = target.device.type == "cuda"
    staged = buffers.take(block.nbytes, pinned=cuda)
    _read(store, block.cover, block, staged.numpy().data, record)
    _compare(store, block, staged.numpy().data, record)
    values = staged.view(dtype).reshape(block.region.shape)
    check_range(block.cover.key, target.dtype, values)
    # A cast is cheaper on the device that it ends on.
    target.copy_(values.to(target.device, non_blocking=True) if cuda else values, non_blocking=cuda)
    if cuda:
        buffers.sent(target.device)


def check_range(key: Key, target: torch.dtype, values: torch.Tensor) -> None:
    """FitError where a finite number is beyond what the target's dtype holds, which would make it infinite."""
    if not target.is_floating_point or torch.finfo(values.dtype).max <= 2 * torch.finfo(target).max:
        return
    if values.dtype.itemsize == 1:
        values = values.float()
    most = torch.finfo(target).max
    low, high = torch.aminmax(values)
    if -most <= low and high <= most:
        return
    beyond = values[values.isfinite() & (values.abs() > most)]
    if len(beyond):
        raise FitError(
            f"{key}: {beyond[0].item():.6g} is beyond {target}, which ends at {most:.6g}",
            hint="give it a target of dtype bfloat16 or wider",
        )


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; its strides may say anything where a dim has size 1."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def _read(store: Store, cover: Cover, block: Block, buffer: memoryview, record: Record) -> None:
    target = Fragment(block.region, Extent.contiguous("", 0, block.region.shape, cover.spec.dtype))
    read_into(store, cover, target, buffer, record, view=block.view)


def _compare(store: Store, block: Block, view: memoryview, record: Record) -> None:
    if block.replicas:
        _compare_replicas(store, block, view, record)
    for twin in block.twins:
        other = memoryview(bytearray(block.nbytes))
        _read(store, twin, block, other, record)
        if other != view:
            raise ConflictError(
                f"{block.cover.key} and {twin.key} are one tensor in the target but differ in the checkpoint",
                hint="untie them in the target, or choose one with map={name: source name}",
            )


def _compare_replicas(store: Store, block: Block, view: memoryview, record: Record) -> None:
    """ConflictError where a further copy of the block differs; the terms of a mean or a sum each against their own."""
    target = Fragment(block.region, Extent.contiguous("", 0, block.region.shape, block.cover.spec.dtype))
    for source in block.cover.sources:
        if not source.replicas:
            continue
        first = view
        if source is not block.cover:
            first = memoryview(bytearray(block.nbytes))
            read_into(store, source, target, first, record, view=block.view)
        for copies in source.replica_copies_into(target, block.view):
            other = memoryview(bytearray(first))
            gather(store, copies, other, record)
            if other != first:
                held = " ".join(sorted({copy.source.object for copy in source.copies_into(target, block.view)}))
                theirs = " ".join(sorted({copy.source.object for copy in copies}))
                raise ConflictError(
                    f"{block.cover.key}: the replica in {theirs} differs from {held}",
                    hint="one of the two is damaged, or the ranks diverged; verify=False takes the first as it is",
                )
