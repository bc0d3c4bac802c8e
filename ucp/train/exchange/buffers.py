"""Memory that is used again and again: two buffers in turn of each kind, so that one is filled while one is emptied."""

from __future__ import annotations

from typing import Literal

import torch

Kind = Literal["read", "device", "sent", "arrived"]


class Buffers:
    """Buffers of an exchange whose messages are on `device`; what is read is pinned where that is not the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[tuple[Kind, int], torch.Tensor] = {}
        self._events: dict[int, torch.cuda.Event] = {}
        self._side = _stream(device)

    def take(self, kind: Kind, number: int, nbytes: int) -> torch.Tensor:
        """`nbytes` bytes for round `number`: those of the last round but one, or more."""
        slot = (kind, number % 2)
        if slot not in self._held or len(self._held[slot]) < nbytes:
            on_host = kind == "read"
            self._held[slot] = torch.empty(
                nbytes,
                dtype=torch.uint8,
                device="cpu" if on_host else self.device,
                pin_memory=on_host and self._side is not None,
            )
        return self._held[slot][:nbytes]

    def to_read(self, number: int, nbytes: int) -> torch.Tensor:
        """Memory of the host to read into, from which no copy is under way any more."""
        event = self._events.pop(number % 2, None)
        if event is not None:
            event.synchronize()
        return self.take("read", number, nbytes)

    def on_device(self, number: int, read: torch.Tensor) -> torch.Tensor:
        """What was read, where messages are sent from; copied by a stream of its own."""
        if self._side is None:
            return read
        data = self.take("device", number, len(read))
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            data.copy_(read, non_blocking=True)
            self._events[number % 2] = event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._side)
        current.wait_stream(self._side)
        return data


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def seen(data: torch.Tensor, dtype: str) -> torch.Tensor:
    """Bytes as numbers."""
    return data.view(getattr(torch, dtype))
