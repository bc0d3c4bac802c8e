"""Differences of training-state trees: each kind is found, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.plan import Extent
from ucp.run.trees import differences
from ucp.store import LocalStore
from ucp.tree import Opaque, TensorLeaf

PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=4))
TREES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
        st.builds(Opaque, st.just("m"), st.sampled_from("ab"), args=st.tuples(inner), state=inner),
    ),
    max_leaves=12,
)
STORES = (LocalStore("."), LocalStore("."))


@given(TREES)
def test_a_tree_is_equal_to_its_like(tree) -> None:
    assert list(differences(tree, reordered(tree), stores=STORES)) == []


def reordered(tree):
    """The same tree with every dict filled the other way round."""
    if isinstance(tree, dict):
        return {key: reordered(tree[key]) for key in reversed(tree)}
    if isinstance(tree, list | tuple):
        return type(tree)(reordered(item) for item in tree)
    return tree


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"x": 1}, {"x": 2}, ("x", "1 against 2")),
        ({"x": 1}, {"x": 1.0}, ("x", "1 against 1.0")),
        ({"x": True}, {"x": 1}, ("x", "True against 1")),
        ({"x": [1]}, {"x": (1,)}, ("x", "list of 1 against tuple of 1")),
        ({"x": {"y": [1, 2]}}, {"x": {"y": [1]}}, ("x.y", "2 against 1 items")),
        ({"x": 1, "y": 2}, {"x": 1, "z": 2}, ("", "keys only in the first: 'y', keys only in the second: 'z'")),
        ({"x": {1, 2}}, {"x": {1, 3}}, ("x", "members only in the first: 2, members only in the second: 3")),
        (Opaque("m", "A"), Opaque("m", "B"), ("", "<m.A> against <m.B>")),
        (Opaque("m", "A", state={"k": 1}), Opaque("m", "A", state={"k": 2}), ("<A>0.k", "1 against 2")),
        (b"a", "a", ("", "b'a' against 'a'")),
    ],
)
def test_each_difference_is_named(a, b, expected) -> None:
    assert list(differences(a, b, stores=STORES)) == [expected]


def test_tensors_are_compared_by_bytes_wherever_they_lie(tmp_path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "a").write_bytes(b"pad!" + array.tobytes())
    (tmp_path / "b").write_bytes(array.T.tobytes())
    stores = (LocalStore(str(tmp_path)), LocalStore(str(tmp_path)))
    straight = TensorLeaf(Extent.contiguous("a", 4, (2, 3), "float32"))
    strided = TensorLeaf(Extent("b", 0, (2, 3), (1, 2), "float32"))
    inline = TensorLeaf(Extent.contiguous("", 0, (2, 3), "float32"), inline=array.tobytes())
    for one in (straight, strided, inline):
        for two in (straight, strided, inline):
            assert list(differences([one], [two], stores=stores)) == []
    other = TensorLeaf(Extent.contiguous("", 0, (2, 3), "float32"), inline=(array + 1).tobytes())
    assert list(differences([straight], [other], stores=stores)) == [("0", "tensor float32[2, 3]: values differ")]
    flat = TensorLeaf(Extent.contiguous("a", 4, (6,), "float32"), numpy=True)
    ((_, message),) = differences([straight], [flat], stores=stores)
    assert message == "tensor float32[2, 3] against array float32[6]"
