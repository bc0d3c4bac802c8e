from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ucp.layout import Box, FlatRange, Shape, numel, ravel
from ucp.plan import Key
from ucp.train.exchange.atoms import Atom, share_reads
from ucp.train.exchange.demand import Demand, Table, Want
from ucp.train.exchange.parts import Layouts, parts_of
from ucp.train.exchange.rounds import ALIGNMENT, in_rounds

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    pairs = [sorted(draw(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))) for n in shape]
    return Box(tuple(a for a, _ in pairs), tuple(b - a + 1 for a, b in pairs))


def demand(shape: Shape, wants: tuple[Want, ...], offset: int = 0) -> Demand:
    return Demand(shape, "float32", ("file", offset), 1, (), wants)


@st.composite
def tables(draw: st.DrawFn) -> list[Table]:
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    found: list[Table] = []
    for _ in range(draw(st.integers(2, 5))):
        table: dict[Key, Demand] = {}
        for number, shape in enumerate(shapes):
            held = draw(st.lists(boxes(shape), max_size=2))
            if held:
                table[Key(f"t{number}", "value")] = demand(shape, tuple((shape, box) for box in held), 1000 * number)
        found.append(table)
    return found


def positions(want: Want) -> set[int]:
    shape, box = want
    return {p for p in range(numel(shape)) if _inside(p, shape, box)}


def _inside(position: int, shape: Shape, box: Box) -> bool:
    index = []
    for n in reversed(shape):
        position, i = divmod(position, n)
        index.append(i)
    return all(a <= i < b for a, i, b in zip(box.start, reversed(index), box.stop, strict=True))


@given(tables(), st.sampled_from([4, 16, 40, 1000]))
def test_every_rank_gets_all_that_it_wants_from_one_place(asked: list[Table], most: int) -> None:
    sharing = share_reads(asked, most=most)
    for rank, table in enumerate(asked):
        for key, wanted in table.items():
            reach: Counter[int] = Counter()
            for run in sharing.alone[rank].get(key, []):
                reach.update(range(run.start, run.stop))
            for atom in sharing.atoms:
                if atom.key == key and rank in atom.ranks:
                    reach.update(range(atom.start, atom.start + atom.length))
            assert set().union(*map(positions, wanted.wants)) <= reach.keys()
            assert set(reach.values()) == {1}
    for atom in sharing.atoms:
        assert atom.owner in atom.ranks
        assert len(atom.ranks) > 1
        assert atom.nbytes <= max(most, 4)
    held = [(atom.key, p) for atom in sharing.atoms for p in range(atom.start, atom.start + atom.length)]
    assert len(held) == len(set(held)), "no atom is read twice"


@given(st.data())
def test_parts_of_all_atoms_are_the_box(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    box = data.draw(boxes(shape))
    size, step = numel(shape), data.draw(st.integers(1, 20))
    found = []
    for start in range(0, size, step):
        for part in parts_of(start, min(step, size - start), [(shape, box)]):
            index = [()] if not shape else [tuple(i) for i in _indices(part.here)]
            for i in index:
                offset = sum((k - a) * n for k, a, n in zip(i, part.here.start, part.strides, strict=True))
                whole = tuple(k + a for k, a in zip(i, box.start, strict=True))
                assert ravel(whole, shape) == start + part.at + offset
                found.append(ravel(whole, shape))
    assert sorted(found) == sorted(positions((shape, box)))


def _indices(box: Box) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for a, b in zip(box.start, box.stop, strict=True):
        found = [(*index, i) for index in found for i in range(a, b)]
    return found


def test_what_all_want_is_read_evenly_in_long_runs() -> None:
    shape = (1000, 10)
    asked: list[Table] = [{Key("w", "value"): demand(shape, ((shape, Box.whole(shape)),))} for _ in range(4)]
    atoms = share_reads(asked, most=400).atoms
    owners = [atom.owner for atom in atoms]
    assert owners == sorted(owners)
    assert Counter(owners) == dict.fromkeys(range(4), 25)


def test_a_rank_that_reads_much_alone_reads_less_for_others() -> None:
    alone, shared = Key("a", "value"), Key("b", "value")
    everything = demand((100,), (((100,), Box.whole((100,))),))
    asked: list[Table] = [{alone: everything, shared: everything}, {shared: everything}]
    sharing = share_reads(asked, most=40)
    assert [atom.owner for atom in sharing.atoms] == [1] * 10
    assert sharing.alone[0][alone] == [(0, 100)]


def test_rounds_stay_within_their_room() -> None:
    shape = (1000, 10)
    asked: list[Table] = [{Key("w", "value"): demand(shape, ((shape, Box.whole(shape)),))} for _ in range(4)]
    atoms = share_reads(asked, most=400).atoms
    rounds = in_rounds(atoms, 4, 1300 + 4 * ALIGNMENT)
    assert sorted((a for found in rounds for a in found), key=lambda a: a.start) == list(atoms)
    assert all(sorted(atom.owner for atom in found) == [0, 1, 2, 3] for found in rounds)
    assert [len(found) for found in in_rounds(atoms, 4, 1)] == [1] * 100


def test_a_message_of_whole_atoms_is_what_was_read() -> None:
    shape = (8, 5)
    key, whole, half = Key("w", "value"), Box.whole(shape), Box((0, 0), (8, 3))
    layouts = Layouts([{key: demand(shape, ((shape, box),))} for box in (whole, whole, half)])
    atoms = [Atom(key, start, 20, 4, (0, 1, 2), 2.6, 0) for start in (0, 20)]
    assert layouts.message(atoms, 1).is_all
    assert layouts.message(atoms, 1).nbytes == 160
    packed = layouts.message(atoms, 2)
    assert not packed.is_all
    assert [(piece.atom, piece.offset) for piece in packed.pieces] == [(0, 0), (1, 48)]


def test_positions_are_those_of_every_view() -> None:
    found = parts_of(5, 10, [((2, 3, 4), Box((0, 1, 0), (2, 1, 4)))])
    assert [(part.here, part.at) for part in found] == [(Box((0, 0, 1), (1, 1, 3)), 0)]
    assert [box.size for box in FlatRange(5, 10).boxes((6, 4))] == [3, 4, 3]
