"""Names of numbered states where the order of parameters is not known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ucp.converters._numbered.names import Candidates, Member, Names, Words, names_without_order
from ucp.plan import Extent
from ucp.tree import TensorLeaf

WORDS = Words("inferred", "tell me")
SHAPES = ((2,), (3,), (2, 3), (3, 2))


def leaf(shape: tuple[int, ...]) -> TensorLeaf:
    return TensorLeaf(Extent.contiguous("x", 0, shape, "float32"))


def names(model: list[tuple[int, ...]], optimizer: list[tuple[int, ...]], hints: list[str] | None = None) -> Names:
    candidates = Candidates({f"p{k}": leaf(shape) for k, shape in enumerate(model)})
    members = [Member({"exp_avg": leaf(shape)}, None) for shape in optimizer]
    return names_without_order(candidates, [members], [hints or []], "optimizer.bin", words=WORDS)


@given(st.permutations(range(4)))
def test_shapes_of_their_own_are_certain_in_any_order(order: list[int]) -> None:
    found = names(list(SHAPES), [SHAPES[k] for k in order])
    assert found.certain == [[f"p{k}" for k in order]]
    assert not found.open


@given(st.lists(st.sampled_from(SHAPES), max_size=6), st.data())
def test_nothing_is_certain_that_could_be_otherwise(model: list[tuple[int, ...]], data: st.DataObject) -> None:
    owned = data.draw(st.permutations(range(len(model))))[: data.draw(st.integers(0, len(model)))]
    found = names(model, [model[k] for k in owned])
    for k, name in zip(owned, found.certain[0], strict=True):
        assert (name == f"p{k}") == (model.count(model[k]) == 1)
        assert name is not None or f"p{k}" in found.open


def test_saved_names_are_believed_if_they_fit() -> None:
    model: list[tuple[int, ...]] = [(2,), (2,), (3,)]
    assert names(model, [(2,), (2,)], ["p1", "p0"]).certain == [["p1", "p0"]]
    assert names(model, [(2,), (2,)], ["p1", "p2"]).certain == [[None, None]]


def test_shapes_that_the_model_does_not_have() -> None:
    found = names([(2,), (3,)], [(4,)])
    assert found.certain == [[None]]
    assert set(found.open) == {"p0", "p1"}
    assert names([(2,), (3,)], [(2,), (2,)]).certain == [[None, None]]
