"""Tasks and plans: what will be written, from where, and at what cost, as pure data.

A task writes one object. Tasks are idempotent and independent of each other, so they may run anywhere in any order,
and one that was cut short is simply run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ucp.layout import FlatRange, itemsize
from ucp.plan.fragment import ZEROS, Extent, Fragment
from ucp.plan.match import Cover

BLOCK_BYTES = 4 << 20
"""Bytes per digest block and per unit of work; a compromise between request count and memory."""

HULL_BYTES = 8 << 20
"""Most bytes read at once for the sake of a strided block inside them."""


@dataclass(frozen=True, slots=True)
class Witness:
    """A low-precision copy of a tensor that must equal the rounded tensor (round to nearest even), or the run fails.

    Frameworks keep bf16/fp16 working weights beside fp32 masters; after every optimizer step the former are the
    rounded latter, so a contradiction means that one of the two is damaged or was read in a wrong order.
    """

    cover: Cover


@dataclass(frozen=True, slots=True)
class Section:
    """A run of bytes of an object that holds one flat range of a logical tensor, in C order.

    Elements are written in `dtype`, rounded from the cover's own if that is another. Replicas and the witness are
    compared before.
    """

    offset: int
    region: FlatRange
    cover: Cover
    witness: Witness | None = None
    dtype: str = ""
    """Empty for the cover's."""

    @property
    def written_dtype(self) -> str:
        """The dtype of the elements in the object."""
        return self.dtype or self.cover.spec.dtype

    @property
    def nbytes(self) -> int:
        """Length of the section."""
        return self.region.length * itemsize(self.written_dtype)

    def blocks(self, block_bytes: int) -> Iterator[FlatRange]:
        """Cut the section's range into consecutive ranges of at most `block_bytes` written bytes."""
        if not self.region.length:
            return
        step = max(1, block_bytes // itemsize(self.written_dtype))
        for start in range(self.region.start, self.region.stop, step):
            yield FlatRange(start, min(step, self.region.stop - start))

    def target(self, region: FlatRange, object: str = "") -> Fragment:
        """The fragment of a buffer that `region` fills in the cover's dtype, from offset 0."""
        return Fragment(region, Extent.contiguous(object, 0, (region.length,), self.cover.spec.dtype))


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of what a task wrote.

    crc32c of each block in order of sections and blocks, and, where the frame asks, the crc32 of each whole section.
    """

    crc32c: tuple[int, ...]
    crc32: tuple[int, ...] = ()


class Frame(Protocol):
    """The bytes of an object around its sections; a frozen dataclass, so that tasks can cross process boundaries."""

    @property
    def block_bytes(self) -> int:
        """Bytes per digest block inside each section."""

    @property
    def needs_crc32(self) -> bool:
        """Whether `suffix` needs the zlib crc32 of each section."""

    def literals(self) -> Iterable[tuple[int, bytes]]:
        """(offset, bytes) known before any data is, in order of offset."""

    def suffix(self, digests: Digests) -> tuple[int, bytes]:
        """(offset, bytes) written last; ends the object."""


@runtime_checkable
class Chain(Frame, Protocol):
    """A frame of several files one after another, each of which ends with digests of its own sections."""

    def after(self, crc32: Sequence[int]) -> Iterable[tuple[int, bytes]]:
        """(offset, bytes) that follow a section; `crc32` are those of all sections up to it."""


@dataclass(frozen=True, slots=True)
class Task:
    """Write `object`: the frame's literals, the sections' data, the frame's suffix. `size` is its final size."""

    object: str
    size: int
    frame: Frame
    sections: tuple[Section, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(section.nbytes for section in self.sections)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan will do, known before it runs. Bytes are exact; those read only to compare are `bytes_checked`."""

    tensors: int
    objects_read: int
    objects_written: int
    bytes_read: int
    bytes_checked: int
    bytes_written: int
    peak_bytes_per_worker: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Tasks in the order they should start, largest first, and their cost."""

    tasks: tuple[Task, ...]
    cost: Cost

    @classmethod
    def of(cls, tasks: Iterable[Task]) -> Plan:
        """Order the tasks and add up their cost."""
        ordered = tuple(sorted(tasks, key=lambda task: (-task.size, task.object)))
        return cls(ordered, _cost(ordered))


def _cost(tasks: tuple[Task, ...]) -> Cost:
    sections = [section for task in tasks for section in task.sections]
    covers = {section.cover.key: section.cover for section in sections}
    witnesses = [(section.region, section.witness.cover) for section in sections if section.witness]
    read = (*covers.values(), *(cover for _, cover in witnesses))
    low = sum(region.length * itemsize(cover.spec.dtype) for region, cover in witnesses)
    replicas = sum(fragment.extent.nbytes for cover in covers.values() for fragment in cover.replicas)
    return Cost(
        tensors=len(covers),
        objects_read=len({f.extent.object for cover in read for f in (*cover.fragments, *cover.replicas)} - {ZEROS}),
        objects_written=len(tasks),
        bytes_read=sum(_read(section) * len(section.cover.sources) for section in sections),
        bytes_checked=low + replicas,
        bytes_written=sum(task.size for task in tasks),
        peak_bytes_per_worker=max((_peak(task) for task in tasks), default=0),
    )


def _read(section: Section) -> int:
    """Bytes of the section's elements as they are read."""
    return section.region.length * itemsize(section.cover.spec.dtype)


def _peak(task: Task) -> int:
    """Bytes a worker holds at most: the block, what it is compared with, its rounding, and one hull of 8 MiB."""
    largest = max((max(section.nbytes, _read(section)) for section in task.sections), default=0)
    widest = max((-(-_read(section) // max(1, section.nbytes)) for section in task.sections), default=1)
    block = min(task.frame.block_bytes * widest, largest)
    return 5 * block + min(HULL_BYTES, 4 * block)
