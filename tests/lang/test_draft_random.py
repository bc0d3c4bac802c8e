"""Any list of tensors has a draft that parses, is sound and takes all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ucp.lang import parse
from ucp.lang.bind import bind
from ucp.lang.check import check
from ucp.lang.draft import draft
from ucp.lang.held import Held
from ucp.layout import Mesh

TEXT = ["a", "layers", "experts", "norm", "weight", "w1", "b c", "{x}", 'q"', "ü"]
WORDS = st.sampled_from([*TEXT, "0", "1", "2", "10", "007"])
NAMES = st.lists(WORDS, min_size=1, max_size=5).map(".".join)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 3, 7]), max_size=3).map(tuple)


@given(st.dictionaries(NAMES, SHAPES, min_size=1, max_size=12), st.booleans())
def test_every_checkpoint_has_a_draft(tensors: dict[str, tuple[int, ...]], states: bool) -> None:
    held = [Held(name, shape, "float32") for name, shape in tensors.items()]
    held += [Held(name, shape, "float32", state="exp_avg") for name, shape in tensors.items() if states]
    found = draft(held, Mesh({}), programs=())
    assert parse(found.text) == found.program
    check(found.program)
    assert found.problem is None
    made = {name for name, _ in bind(found.program, held, mesh=Mesh({})).tensors}
    assert made == set(tensors)


@given(st.dictionaries(NAMES, SHAPES, min_size=1, max_size=6), st.sampled_from(["tp", "pp", "ep"]), st.data())
def test_every_grid_has_a_draft(tensors: dict[str, tuple[int, ...]], axis: str, data: st.DataObject) -> None:
    mesh = Mesh({axis: 2})
    held = [
        Held(name, shape, "float32", {axis: index})
        for name, shape in tensors.items()
        for index in data.draw(st.sampled_from([(0,), (1,), (0, 1)]))
    ]
    equal = data.draw(st.sampled_from([None, True, False]))
    found = draft(held, mesh, same=lambda *_: equal, programs=())
    assert parse(found.text) == found.program
    check(found.program)
    assert found.problem is None
