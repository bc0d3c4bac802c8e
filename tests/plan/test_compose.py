from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.test_match import KEY, scatter, view
from ucp.layout import Box, numel
from ucp.layout.block import NO_STEP, Block, View
from ucp.plan import Cover, Fragment, TensorSpec
from ucp.plan.compose import compose
from ucp.testing.strategies import box_cuts, extents, factors, fragmentations

LEAVES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@st.composite
def layouts(draw):
    """Leaf sizes, the leaves of each dim of a logical tensor, and those of each dim of the shards."""
    leaves = draw(LEAVES)

    def grouped(order):
        cuts = sorted(draw(st.lists(st.integers(0, len(leaves)), max_size=2)))
        edges = [0, *cuts, len(leaves)]
        return [order[a:b] for a, b in itertools.pairwise(edges) if a < b]

    logical = grouped(list(range(len(leaves))))
    return leaves, logical, grouped(draw(st.permutations(range(len(leaves)))))


def block_of(box, leaves, dims):
    """The block that holds `box` of the leaves, laid out as `dims`, in a shard of just this box."""
    steps = [NO_STEP] * len(leaves)
    for dim, group in enumerate(dims):
        stride = 1
        for leaf in reversed(group):
            steps[leaf] = (dim, stride) if box.shape[leaf] > 1 else NO_STEP
            stride *= box.shape[leaf]
    shape = tuple(numel(tuple(box.shape[leaf] for leaf in group)) for group in dims)
    return Block(box, (0,) * len(dims), tuple(steps)), shape


@given(st.data())
def test_shards_held_in_any_pieces_make_up_a_tensor_of_other_dims(data):
    """Any permutation and grouping of leaves, any boxes of it as shards, each shard in any fragments."""
    leaves, logical, dims = data.draw(layouts())
    tensor = np.arange(numel(tuple(leaves)), dtype="<i4").reshape(leaves)
    seen = View(tuple(tuple(leaves[leaf] for leaf in group) for group in logical))
    fragments, objects = [], {}
    for number, box in enumerate(data.draw(box_cuts(tuple(leaves)))):
        block, shape = block_of(box, leaves, dims)
        order = [leaf for group in dims for leaf in group]
        shard = tensor[tuple(map(slice, box.start, box.stop))].transpose(order).reshape(shape)
        held = data.draw(fragmentations(shape))
        renamed = {f.extent.object: f"{number}-{f.extent.object}" for f in held}
        objects |= {renamed[name]: memory for name, memory in scatter(shard, held).items()}
        for fragment in held:
            for part in compose(fragment, block, shape, view=seen):
                extent = part.extent
                named = type(extent)(renamed[extent.object], extent.offset, extent.shape, extent.strides, extent.dtype)
                fragments.append(Fragment(part.region, named))
    cover = Cover.of(KEY, TensorSpec(seen.tensor, "int32"), fragments, view=seen)
    wanted = View(tuple(tuple(data.draw(factors(n))) for n in seen.tensor))
    target = Fragment(Box.whole(wanted.shape), data.draw(extents("out", wanted.shape, "int32", 4)))
    out = np.full(target.extent.span[1] // 4 + 1, -7, "<i4")
    for copy in cover.copies_into(target, wanted):
        view(out, copy.target)[...] = view(objects[copy.source.object], copy.source)
    np.testing.assert_array_equal(view(out, target.extent), tensor.reshape(wanted.shape))
