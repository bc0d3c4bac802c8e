"""Copies are spread evenly, and never on the node that writes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ucp.elastic.nodes import buddies
from ucp.elastic.nodes.placement import wards

names = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=12, unique=True)


@given(names, st.integers(1, 14), st.randoms())
def test_every_object_has_its_copies_and_every_node_keeps_as_much(nodes, copies, random) -> None:
    placed = {node: buddies(node, nodes, copies) for node in nodes}
    for node, others in placed.items():
        assert len({node, *others}) == len(others) + 1 == min(copies, len(nodes))
        assert set(others) <= set(nodes)
        shuffled = random.sample(nodes, len(nodes))
        assert buddies(node, shuffled, copies) == others, "the order in which nodes are told does not matter"
    kept = Counter(other for others in placed.values() for other in others)
    assert set(kept.values()) <= {min(copies, len(nodes)) - 1}


@given(names, st.data())
def test_every_node_without_active_ranks_is_tended_by_one_that_has_some(nodes, data) -> None:
    active = data.draw(st.lists(st.sampled_from(nodes), min_size=1, unique=True))
    tended = {me: wards(me, nodes, active) for me in active}
    assert Counter(node for some in tended.values() for node in some) == Counter(set(nodes) - set(active))
    assert max(map(len, tended.values())) - min(map(len, tended.values())) <= 1


def test_two_nodes_keep_each_others() -> None:
    assert buddies("a", ["a", "b"], 2) == ("b",)
    assert buddies("b", ["a", "b"], 2) == ("a",)
    assert buddies("c", ["a", "b", "c", "d"], 3) == ("d", "a")
    assert buddies("a", ["a"], 3) == ()
