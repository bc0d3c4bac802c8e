"""Where parameters lie in the flat buffers of Megatron-Core's distributed optimizer.

megatron/core/distributed/param_and_grad_buffer.py, ``_ParamAndGradBuffer``: from the last parameter to the first, each
at a multiple of 64 elements. A bucket ends when it holds enough, and before and after an embedding that pipeline stages
share; its end is padded, but what is saved leaves that padding out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product

from .arguments import Arguments

ALIGNMENT = 64
_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000
"""``DistributedDataParallel``: gradients of a bucket, unless told otherwise."""


def aligned(position: int) -> int:
    """The next multiple of 64."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def in_buckets(sizes: Sequence[int], buckets: Sequence[int]) -> list[tuple[int, int]] | None:
    """(bucket, first element in it) of parameters of `sizes`, given how many elements each bucket has.

    None if they do not fill the buckets exactly. A bucket may end with padding up to a multiple of 64, which is kept
    before a shared embedding.
    """
    found: list[tuple[int, int]] = []
    bucket, stop = 0, 0
    for size in reversed(sizes):
        start = aligned(stop)
        stop = start + size
        if bucket == len(buckets) or stop > buckets[bucket]:
            return None
        found.append((bucket, start))
        if buckets[bucket] in (stop, aligned(stop)):
            bucket, stop = bucket + 1, 0
    return found[::-1] if bucket == len(buckets) else None


def coalesced(sizes: Sequence[int], *, shared: Collection[int], limit: int | None) -> tuple[list[int], int]:
    """First element of each parameter where all buckets are joined without the padding between them, and the total.

    `shared` are numbers of embeddings that stages share, `limit` is the number of elements that closes a bucket.
    """
    found: dict[int, int] = {}
    base, stop = 0, 0
    empty = True
    for number in reversed(range(len(sizes))):
        start = aligned(stop)
        if number in shared and not empty:
            base, start = base + start, 0
        found[number] = base + start
        stop, empty = start + sizes[number], False
        if number in shared or (limit is not None and stop >= limit):
            base, stop, empty = base + stop, 0, True
    return [found[number] for number in range(len(sizes))], base + stop


def starts_of(
    args: Arguments, sizes: Sequence[int], *, edges: Collection[int], first: bool, total: int
) -> list[int] | None:
    """First element of each parameter in all buckets joined, as the job's arguments have them filled.

    `edges` are numbers of embedding and head, `first` says that it is the first chunk of the first stage, which alone
    is cut into buckets. None if no way in which buckets may have been filled gives `total` elements.
    """
    ties = [args.tied] if args.tied is not None else [True, False]
    shares = [edges if tied and args.pp > 1 else () for tied in ties]
    limits: list[int | None] = [None]
    if first and args.truth("overlap_grad_reduce") is not False:
        limits.insert(0, args.number("ddp_bucket_size") or max(_BUCKET, _BUCKET_PER_RANK * args.dp))
    for shared, limit in product(shares, limits):
        starts, length = coalesced(sizes, shared=shared, limit=limit)
        if length == total:
            return starts
    return None
