"""How ZeRO cuts parameters into the flat tensors of ranks: pure arithmetic over sizes in elements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_START_ALIGNMENT = 2
"""``nccl_start_alignment_factor`` (deepspeed/runtime/zero/stage_1_and_2.py, deepspeed/runtime/bf16_optimizer.py)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` elements of a flat tensor: those of parameter `name` from `start` on, or padding where that is None."""

    name: str | None
    start: int
    length: int


def partition_size(sizes: Mapping[str, int], *, dp: int) -> int:
    """Elements of each rank's part of a flat group: ZeRO 1 and 2 pad its end to a multiple of 2·dp."""
    unit = _START_ALIGNMENT * dp
    return -(-sum(sizes.values()) // unit) * unit // dp


def flat_partition(sizes: Mapping[str, int], *, dp: int, rank: int) -> list[Piece]:
    """The part of `rank` of a group that is one flat tensor over all ranks: ZeRO 1, ZeRO 2 and BF16_Optimizer.

    Parameters lie one after the other whatever the ends of the parts are, padding behind the last one
    (deepspeed/runtime/zero/stage_1_and_2.py, ``flatten_dense_tensors_aligned``, ``get_data_parallel_partitions``).
    """
    size = partition_size(sizes, dp=dp)
    begin, end = rank * size, (rank + 1) * size
    pieces, at = [], 0
    for name, count in sizes.items():
        start, stop = max(at, begin), min(at + count, end)
        if start < stop:
            pieces.append(Piece(name, start - at, stop - start))
        at += count
    padding = end - max(at, begin)
    return [*pieces, Piece(None, 0, padding)] if padding > 0 else pieces


def sliced(name: str, count: int, *, dp: int, rank: int) -> Iterator[Piece]:
    """The slice of `rank` of one parameter under ZeRO 3, ⌈count / dp⌉ elements with padding.

    deepspeed/runtime/zero/partition_parameters.py, ``_partition_param``.
    """
    size = -(-count // dp)
    held = min(max(count - rank * size, 0), size)
    if held:
        yield Piece(name, rank * size, held)
    if held < size:
        yield Piece(None, 0, size - held)


def sliced_partition(sizes: Mapping[str, int], *, dp: int, rank: int) -> list[Piece]:
    """The part of `rank` of a sub-group of ZeRO 3: the slices of its parameters, one after the other."""
    return [piece for name, count in sizes.items() for piece in sliced(name, count, dp=dp, rank=rank)]


def sub_groups(sizes: Mapping[str, int], *, dp: int, most: int) -> list[dict[str, int]]:
    """The sub-groups of a group under ZeRO 3: each ends with the parameter that brings it to `most` elements per rank.

    deepspeed/runtime/zero/stage3.py, ``_create_fp16_sub_groups``.
    """
    groups: list[dict[str, int]] = []
    held = most
    for name, count in sizes.items():
        if held >= most:
            groups.append({})
            held = 0
        groups[-1][name] = count
        held += -(-count // dp)
    return groups


def dealt(names: Sequence[str], *, dp: int) -> list[str]:
    """The flat order under ``round_robin_gradients``: dealt out to ranks in turn, then one rank's after the other.

    deepspeed/runtime/zero/stage_1_and_2.py, ``_round_robin_reorder``.
    """
    return [name for rank in range(dp) for name in names[rank::dp]]


def collected(names: Sequence[str], *, dp: int) -> list[str]:
    """The inverse of `dealt`."""
    places = dealt([str(place) for place in range(len(names))], dp=dp)
    return [name for _, name in sorted(zip(map(int, places), names, strict=True))]


def held(pieces: Sequence[Piece]) -> int:
    """Elements that are no padding."""
    return sum(piece.length for piece in pieces if piece.name is not None)
