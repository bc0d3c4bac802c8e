"""Objects of torch's distributed checkpoints (``__0_0.distcp``): torch files one after another, addressed from outside.

Each item is what ``torch.save`` writes of one tensor, or of something else that was pickled before
(torch/distributed/checkpoint/filesystem.py, ``_write_item``). ``.metadata`` says where it starts and ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from itertools import accumulate

from ucp.container.crc import combine
from ucp.container.torchwrite import Slot, TorchFrame
from ucp.plan import BLOCK_BYTES, Digests, TensorSpec


@dataclass(frozen=True, slots=True)
class TensorItem:
    """A torch file of one tensor, whose bytes, C order, are consecutive sections of `lengths` bytes."""

    spec: TensorSpec
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert sum(self.lengths) == self.spec.nbytes, f"sections of {self.lengths} bytes are no {self.spec}"


@dataclass(frozen=True)
class DistcpFrame:
    """A `ucp.plan.Chain`: torch files one after another, whose tensors' bytes are the sections of a task.

    `items` are whole files as bytes, or tensors. Item i lies at byte ``places[i][0]`` and has ``places[i][1]`` bytes;
    section j of the task starts at byte ``offsets[j]``; the object has `size` bytes.
    """

    items: tuple[bytes | TensorItem, ...]
    block_bytes: int = BLOCK_BYTES

    @property
    def needs_crc32(self) -> bool:
        """Each file's directory holds the CRC-32 of its tensor."""
        return True

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(offset, length) of each item."""
        lengths = [len(item) if isinstance(item, bytes) else _Around.of(item.spec).size for item in self.items]
        return tuple(zip(accumulate(lengths, initial=0), lengths, strict=False))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Byte at which each section starts."""
        found: list[int] = []
        for item, (offset, _) in zip(self.items, self.places, strict=True):
            if isinstance(item, TensorItem):
                start = offset + _Around.of(item.spec).start
                found.extend(start + before for before in accumulate(item.lengths[:-1], initial=0))
        return tuple(found)

    @property
    def size(self) -> int:
        """Bytes of the whole object."""
        return sum(self.places[-1]) if self.places else 0

    def literals(self) -> Iterable[tuple[int, bytes]]:
        """Everything up to the tensors' bytes; what comes after those is given by `after`."""
        for item, (offset, _) in zip(self.items, self.places, strict=True):
            if isinstance(item, bytes):
                yield offset, item
            else:
                yield from ((offset + at, data) for at, data in _Around.of(item.spec).head)

    def after(self, crc32: Sequence[int]) -> Iterable[tuple[int, bytes]]:
        """What ends the file whose last section was the last of `crc32`, those of all sections so far."""
        number = self._ending.get(len(crc32))
        if number is None:
            return
        item, (offset, _) = self.items[number], self.places[number]
        assert isinstance(item, TensorItem)
        own = zip(crc32[-len(item.lengths) :], item.lengths, strict=True)
        whole, _ = reduce(lambda a, b: (combine("crc32", a[0], b[0], b[1]), 0), own)
        at, data = _Around.of(item.spec).frame.suffix(Digests((), (whole,)))
        yield offset + at, data

    def suffix(self, digests: Digests) -> tuple[int, bytes]:
        """Nothing: each file has its own end."""
        return self.size, b""

    @cached_property
    def _ending(self) -> dict[int, int]:
        """The item that ends with section n, counted from 1."""
        counts = accumulate(0 if isinstance(item, bytes) else len(item.lengths) for item in self.items)
        held = zip(counts, self.items, strict=True)
        return {count: number for number, (count, item) in enumerate(held) if isinstance(item, TensorItem)}


@dataclass(frozen=True, slots=True)
class _Around:
    """The torch file around a tensor of one shape and dtype."""

    frame: TorchFrame
    head: tuple[tuple[int, bytes], ...]
    start: int
    size: int

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(spec: TensorSpec) -> _Around:
        frame = TorchFrame.of(Slot(0, spec))
        return _Around(frame, tuple(frame.literals()), frame.offsets[0], frame.size)
