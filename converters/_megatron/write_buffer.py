"""Where parameters lie in a buffer of the distributed optimizer, as it is saved."""

from __future__ import annotations

from collections.abc import Sequence

_ALIGNED = 64
"""Elements (megatron/core/distributed/param_and_grad_buffer.py, ``_pad_start_of_param_if_needed``)."""


def laid(sizes: Sequence[int], shared: Sequence[bool]) -> tuple[list[int], int]:
    """First element of each parameter, in the order given, and the length of the whole.

    Parameters lie in reverse order, each at a multiple of 64 elements from the start of its bucket. A `shared` one, the
    table of embeddings that two pipeline stages hold, is a bucket of its own; all others are in one bucket as long as
    gradients are not reduced while they are computed. A saved buffer has its buckets end to end without the padding at
    their ends.
    """
    places = [0] * len(sizes)
    start = filled = 0
    for i in reversed(range(len(sizes))):
        at = -(-filled // _ALIGNED) * _ALIGNED
        if shared[i] and filled:
            start, at = start + at, 0
        places[i], filled = start + at, at + sizes[i]
        if shared[i]:
            start, filled = start + filled, 0
    return places, start + filled
