"""Staging: what a rank is to write, copied into host memory that is kept from save to save."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ucp.format.native_shard import Piece
from ucp.train.save.digest import device_digest, digests
from ucp.train.save.plan import Cut

_ALIGN = 64
_BUFFERS = 2
"""One that is filled while the other one is written; a save that finds both in use waits for the first."""


@dataclass(slots=True)
class Buffer:
    """Host memory, pinned where it takes what lies on a GPU, and the views of it that the last save filled."""

    memory: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    cuts: Sequence[Cut] = ()
    views: list[torch.Tensor] = field(default_factory=list)

    def lay_out(self, cuts: Sequence[Cut], *, pinned: bool) -> list[torch.Tensor]:
        """A place for each of `cuts`, of its shape and dtype; those of the last time if they are the same."""
        if self.cuts is cuts and pinned == self.memory.is_pinned():
            return self.views
        starts, total = [], 0
        for cut in cuts:
            starts.append(total)
            total += -(-cut.piece.nbytes // _ALIGN) * _ALIGN
        if total > self.memory.numel() or pinned != self.memory.is_pinned():
            self.views, self.memory = [], torch.empty(0, dtype=torch.uint8)
            self.memory = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
        self.cuts = cuts
        self.views = [_view(self.memory, start, cut.piece) for start, cut in zip(starts, cuts, strict=True)]
        return self.views


def _view(memory: torch.Tensor, start: int, piece: Piece) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, piece.dtype)
    return memory[start : start + piece.nbytes].view(dtype).view(piece.box.shape)


class Buffers:
    """The buffers of a rank."""

    def __init__(self) -> None:
        self._free = [Buffer() for _ in range(_BUFFERS)]
        self._changed = threading.Condition()

    def take(self) -> Buffer:
        """One that is in use no more, that which was used last if there is a choice; waits until there is one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free))
            return self._free.pop()

    def give_back(self, buffer: Buffer) -> None:
        """What `take` gave is written, or not needed any more."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def release(self) -> None:
        """Let go of the memory of all that are not in use."""
        with self._changed:
            self._free = [Buffer() for _ in self._free]


@dataclass(slots=True)
class Staging:
    """A copy of `cuts` under way, and the digests of copies that other ranks write."""

    staged: dict[Piece, torch.Tensor] = field(default_factory=dict)
    compared: dict[Piece, Any] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    events: list[torch.cuda.Event] = field(default_factory=list)

    def wait(self) -> None:
        """Until the copy is complete: what it was made of may change from then on."""
        for event in self.events:
            event.synchronize()
        self.compared = {
            piece: int(found.item()) if isinstance(found, torch.Tensor) else found
            for piece, found in self.compared.items()
        }
        self.kept.clear()
        self.events.clear()


def stage(buffer: Buffer, memory: Mapping[Piece, torch.Tensor], cuts: Sequence[Cut], check: Sequence[Cut]) -> Staging:
    """Start to copy `cuts` of `memory` into `buffer`, and to digest those to `check`.

    What lies on a GPU is copied on a stream of its own, after all that was queued on the current one before.
    """
    sources = [memory[cut.of][cut.slices] for cut in cuts]
    on_device = {source.device for source in (*sources, *(memory[cut.of] for cut in check)) if source.is_cuda}
    views = buffer.lay_out(cuts, pinned=bool(on_device))
    made = Staging({cut.piece: view for cut, view in zip(cuts, views, strict=True)})
    with torch.no_grad():
        _copy([(view, source) for view, source in zip(views, sources, strict=True) if not source.is_cuda])
        for device in on_device:
            _on_side_stream(device, made, list(zip(cuts, views, sources, strict=True)), memory, check)
        for cut in check:
            source = memory[cut.of]
            if not source.is_cuda:
                made.compared[cut.piece] = digests(source[cut.slices])
    return made


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, non_blocking: bool = False) -> None:
    if pairs:
        torch._foreach_copy_([view for view, _ in pairs], [source for _, source in pairs], non_blocking=non_blocking)


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _on_side_stream(
    device: torch.device,
    made: Staging,
    copies: Sequence[tuple[Cut, torch.Tensor, torch.Tensor]],
    memory: Mapping[Piece, torch.Tensor],
    check: Sequence[Cut],
) -> None:
    stream = _STREAMS.get(device)
    if stream is None:
        stream = _STREAMS[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    mine = [(cut, view, source) for cut, view, source in copies if source.device == device]
    with torch.cuda.stream(stream):
        # A copy of something with gaps goes to the host at full speed only from a dense copy on the device.
        dense = [(view, source.contiguous()) for _, view, source in mine]
        _copy(dense, non_blocking=True)
        for cut, _, source in mine:
            if cut.compare == "device":
                made.compared[cut.piece] = device_digest(source)
        for cut in check:
            source = memory[cut.of][cut.slices]
            if source.device == device:
                made.compared[cut.piece] = device_digest(source) if cut.compare == "device" else digests(source)
        made.kept += [dense, [source for _, _, source in mine]]
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        made.events.append(event)
