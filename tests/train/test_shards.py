from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ucp.layout import Box
from ucp.plan import split
from ucp.train.shards import Runs, cut


def expand(runs: Runs) -> list[int]:
    return [i for start, length in runs for i in range(start, start + length)]


@given(
    st.integers(0, 60),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3),
    st.data(),
)
def test_cuts_are_those_of_torch(size: int, axes: list[tuple[int, int]], data: st.DataObject) -> None:
    runs: Runs = [(0, size)]
    held = torch.arange(size)
    for chunks, factor in axes:
        index = data.draw(st.integers(0, chunks - 1))
        placement = Shard(0) if factor == 1 else _StridedShard(0, split_factor=factor)
        pieces, _ = placement._split_tensor(held, chunks, with_padding=False)
        held = pieces[index]
        runs = cut(runs, chunks, index, factor)
        assert expand(runs) == held.tolist()
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs)), "neighbours are joined"


@given(st.lists(st.integers(1, 6), max_size=4), st.integers(1, 50))
def test_splitting_covers_a_box_in_order(shape: list[int], most: int) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    box = Box(tuple(range(len(shape))), tuple(shape))
    parts = list(split(box, most))
    assert all(part.size <= most for part in parts)
    here = [part.relative_to(box.start) for part in parts]
    got = [whole[tuple(slice(a, b) for a, b in zip(p.start, p.stop, strict=True))].reshape(-1) for p in here]
    assert torch.cat(got).tolist() == list(range(whole.numel()))
