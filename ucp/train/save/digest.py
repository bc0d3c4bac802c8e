"""Digests by which copies of the same elements on different ranks are compared."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from crc32c import crc32c

from ucp.format.native_manifest import BLOCK_BYTES

_LANES = 4 << 20
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 divided by the golden ratio, which is odd, as a signed number: its multiples are spread over all 64 bits."""


def blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of `tensor` in C order, BLOCK_BYTES at a time; on a device they come through two pinned buffers."""
    flat = tensor.reshape(-1)
    step = BLOCK_BYTES // flat.element_size()
    pieces = (flat[start : start + step] for start in range(0, flat.numel(), step))
    for piece in _fetched(pieces) if tensor.is_cuda else pieces:
        yield as_bytes(piece)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in C order: its own memory where it lies so on the CPU."""
    # Where a dim has size 1, the strides of what has no gaps may say anything.
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def digests(tensor: torch.Tensor) -> tuple[int, ...]:
    """crc32c of each block."""
    return tuple(crc32c(block) for block in blocks(tensor))


def device_digest(tensor: torch.Tensor) -> torch.Tensor:
    """64 bits of the contents of `tensor`, computed where it lies, without waiting: an int64 tensor without dims.

    The sum, modulo 2^64, of all 4-byte words times a multiplier that depends on where they are, mixed between; the
    rest of fewer than 4 bytes is filled up with zeros.
    """
    data = tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, data.numel(), 4 * _LANES):
        piece = data[start : start + 4 * _LANES]
        if piece.numel() % 4 or piece.storage_offset() % 4:
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % 4))
        words = piece.view(torch.int32).to(torch.int64)
        words += 1
        places = torch.arange(start // 4 + 1, start // 4 + 1 + words.numel(), device=tensor.device)
        words *= places.mul_(_ODD)
        words ^= words >> 29
        total += words.sum()
    return total


def _fetched(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """`pieces` on the host, one after the other, while the next one is on its way."""
    pair: list[torch.Tensor] = []
    ahead: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for number, piece in enumerate(pieces):
        if len(pair) < 2:
            pair.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True))
        nbytes = piece.numel() * piece.element_size()
        host = pair[number % 2][:nbytes].view(piece.dtype)
        host.copy_(piece, non_blocking=True)
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(piece.device))
        if ahead is not None:
            ahead[1].synchronize()
            yield ahead[0]
        ahead = host, event
    if ahead is not None:
        ahead[1].synchronize()
        yield ahead[0]
