"""How ZeRO lays parameters into flat partitions: pure arithmetic from shapes and sizes to fragments.

ZeRO 1 and 2 (deepspeed/runtime/zero/stage_1_and_2.py, ``__init__``; deepspeed/runtime/bf16_optimizer.py,
``_setup_for_real_optimizer``): the parameters of a group one after another, each followed by its own alignment padding
where ``parameter_alignment`` is on, padded at the end to a multiple of 2·dp and cut into dp equal partitions. Parameter
boundaries and partition boundaries ignore each other.

ZeRO 3 (deepspeed/runtime/zero/partition_parameters.py, ``_partition_numel``): every parameter by itself in dp parts of
ceil(n / dp) elements, the last ones padded; a rank's sub-group is its parts one after another, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ucp.errors import CorruptError
from ucp.layout import Box, FlatRange, Shape, numel
from ucp.plan import Extent, Fragment

Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """One parameter group of ZeRO 1 or 2.

    `starts` are positions of the parameters in the group's flat order, `total` is one past the last element,
    `partition` the number of elements per rank.
    """

    shapes: Shapes
    starts: Mapping[str, int]
    total: int
    partition: int
    dp: int

    def held(self, rank: int) -> int:
        """Elements of the rank's partition that are not padding at the group's end."""
        return min(max(self.total - rank * self.partition, 0), self.partition)

    def fits(self, rank: int, length: int) -> bool:
        """Whether a flat tensor of `length` elements is like the rank's partition, with or without end padding."""
        return length in (self.partition, self.held(rank))

    def fragments(self, parts: Sequence[Extent]) -> dict[str, tuple[Fragment, ...]]:
        """Where every parameter lies in the ranks' flat tensors `parts`."""
        return {name: tuple(self._of(name, parts)) for name in self.shapes}

    def _of(self, name: str, parts: Sequence[Extent]) -> Iterator[Fragment]:
        start = self.starts[name]
        stop = start + numel(self.shapes[name])
        first = start // self.partition if self.partition else 0
        for rank in range(first, self.dp):
            origin = rank * self.partition
            a, b = max(start, origin), min(stop, origin + self.partition)
            if a >= b:
                return
            yield Fragment(FlatRange(a - start, b - a), parts[rank].sub(Box((a - origin,), (b - a,))))


def flat_group(
    shapes: Shapes, *, paddings: Sequence[int] | None, lengths: Sequence[int], ends: Sequence[int] | None, where: str
) -> FlatGroup:
    """The layout of a group from its shapes in flat order and the `lengths` of the ranks' fp32 tensors.

    `paddings` follow each parameter; `ends` is the padding at the end of each rank's partition as the ranks state it.
    CorruptError naming `where` if these numbers contradict each other.
    """
    starts: dict[str, int] = {}
    total = 0
    gaps = paddings if paddings is not None else [0] * len(shapes)
    if len(gaps) != len(shapes):
        raise CorruptError(f"{where}: {len(gaps)} alignment paddings for {len(shapes)} parameters")
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        starts[name] = total
        total += numel(shape) + gap
    group = FlatGroup(shapes, starts, total, _partition(total, lengths, ends), len(lengths))
    _check(group, lengths, ends, where)
    return group


def _partition(total: int, lengths: Sequence[int], ends: Sequence[int] | None) -> int:
    """Elements per rank: BF16_Optimizer saves whole partitions, the others leave out the padding at the end."""
    dp = len(lengths)
    if ends is None:
        return max(2 * -(-total // (2 * dp)), *lengths)
    if dp == 1:
        return max(total + ends[0], lengths[0])
    if len(set(lengths)) == 1:
        return lengths[0]
    return max(length + end for length, end in zip(lengths, ends, strict=True))


def _check(group: FlatGroup, lengths: Sequence[int], ends: Sequence[int] | None, where: str) -> None:
    capacity = group.partition * group.dp
    wrong = [rank for rank, length in enumerate(lengths) if not group.fits(rank, length)]
    if wrong or not group.total <= capacity < group.total + 2 * group.dp:
        raise CorruptError(
            f"{where}: flat partitions of {list(lengths)} elements cannot hold parameters of {group.total} elements "
            f"over {group.dp} ranks",
            hint="a rank's file is of another save, or the checkpoint is damaged",
        )
    if ends is not None and sum(ends) != capacity - group.total:
        raise CorruptError(f"{where}: paddings {list(ends)} contradict {group.total} elements in {capacity}")


@dataclass(frozen=True, slots=True)
class PartitionedGroup:
    """One sub-group of ZeRO 3, or a frozen parameter of it: `length` is the number of elements of each rank's part."""

    shapes: Shapes
    dp: int

    @property
    def length(self) -> int:
        """Elements of a rank's flat tensor, padding included."""
        return sum(-(-numel(shape) // self.dp) for shape in self.shapes.values())

    def held(self, rank: int) -> int:
        """Elements that states of the rank must have: its part is padded parameter by parameter, so all of them."""
        del rank
        return self.length

    def fits(self, rank: int, length: int) -> bool:
        """Whether a flat tensor of `length` elements is like the rank's part."""
        return length == self.held(rank)

    def fragments(self, parts: Sequence[Extent]) -> dict[str, tuple[Fragment, ...]]:
        """Where every parameter lies in the ranks' flat tensors `parts`."""
        found: dict[str, tuple[Fragment, ...]] = {}
        offset = 0
        for name, shape in self.shapes.items():
            piece = -(-numel(shape) // self.dp)
            found[name] = tuple(_pieces(numel(shape), piece, offset, parts))
            offset += piece
        return found


def partitioned_group(shapes: Shapes, *, lengths: Sequence[int], where: str) -> PartitionedGroup:
    """The layout of a sub-group, checked against the `lengths` of the ranks' fp32 tensors.

    CorruptError naming `where` if they contradict each other.
    """
    group = PartitionedGroup(shapes, len(lengths))
    if any(length != group.length for length in lengths):
        raise CorruptError(
            f"{where}: parts of {list(lengths)} elements, but its parameters take {group.length} on each rank",
            hint="a rank's file is of another save, or its tensors were offloaded to NVMe and are not in the file",
        )
    return group


def _pieces(size: int, piece: int, offset: int, parts: Sequence[Extent]) -> Iterator[Fragment]:
    for rank, part in enumerate(parts):
        start = rank * piece
        length = min(piece, size - start)
        if length <= 0:
            return
        yield Fragment(FlatRange(start, length), part.sub(Box((offset,), (length,))))
