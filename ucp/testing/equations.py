"""Hypothesis strategies for equations: a random layout, its logical tensors, and a mesh and sizes at which they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hypothesis import assume
from hypothesis import strategies as st

from ucp.layout import Mesh, Setting, branches
from ucp.layout.expr import Concat, Cut, Dim, Expr, Layout, Number, Pad, Product, concat, product
from ucp.layout.spell import cut_name
from ucp.testing.oracle import read_dim

LARGEST = 400
"""Elements of a shard; the oracle looks at each."""


@dataclass(frozen=True, slots=True)
class Equation:
    """A source layout and its targets, at a setting. `fixed` are leaves that the source's name fixes, with sizes."""

    source: Layout
    targets: tuple[Layout, ...]
    setting: Setting
    fixed: tuple[str, ...]
    captured: tuple[frozenset[str], ...]

    @property
    def replicated(self) -> bool:
        """Whether ranks hold the same because the placement of a dim says so."""
        return any(len(set(sum(held.values(), ()))) < sum(map(len, held.values())) for held in self.placed)

    @property
    def placed(self) -> tuple[Mapping[int, tuple[int, ...]], ...]:
        """Every placement."""
        return tuple(self.setting.placements.values())

    def fixed_at(self, coordinate: Mapping[str, int], values: Mapping[str, int]) -> dict[str, int]:
        """Values of the fixed leaves at `coordinate`: those of axes are its own."""
        return {name: coordinate[name] if name in coordinate else values[name] for name in self.fixed}


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """A mesh of up to three axes and twelve ranks."""
    axes = draw(st.lists(st.sampled_from("tp pp ep".split()), unique=True, max_size=3))
    mesh = Mesh(tuple((axis, draw(st.integers(1, 4))) for axis in axes))
    assume(mesh.size <= 12)
    return mesh


@st.composite
def equations(draw: st.DrawFn) -> Equation:
    """An equation that fits its setting, with any mix of composed, joined, cut, placed and padded dims."""
    maker = _Maker(draw, draw(meshes()))
    dims, names, free = [], frozenset[str](), tuple(axis for axis, _ in maker.mesh.axes)
    for _ in range(draw(st.integers(1, 3))):
        dims.append(maker.expr(2, names, free))
        names |= _names(dims[-1])
        free = tuple(axis for axis in free if axis not in _axes(dims[-1]))
    source = Layout(tuple(dims))
    setting = maker.setting()
    longest = [max(maker.lengths(dim)) for dim in dims]
    assume(math.prod(longest) <= LARGEST)
    fixed = maker.fixed(names, free)
    found = branches(source)
    targets = [maker.target(branch.leaves, fixed) for branch in found]
    return Equation(source, tuple(t for t, _ in targets), setting, fixed, tuple(c for _, c in targets))


class _Maker:
    """Draws the parts of one equation, and remembers sizes and recorded geometry."""

    def __init__(self, draw: st.DrawFn, mesh: Mesh) -> None:
        self.draw = draw
        self.mesh = mesh
        self.sizes: dict[str, int] = {}
        self.cuts: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = {}
        self.placements: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {}

    def setting(self) -> Setting:
        return Setting(self.mesh, self.sizes, self.cuts, self.placements)

    def expr(self, depth: int, avoid: frozenset[str], free: Sequence[str]) -> Expr:
        kind = self.draw(st.sampled_from(["dim", "product", "concat"] if depth else ["dim"]))
        if kind == "dim":
            return self.dim(avoid, free)
        made = self.product(depth, avoid, free) if kind == "product" else self.concat(depth, avoid, free)
        return self.composed_cut(made, [axis for axis in free if axis not in _axes(made)])

    def product(self, depth: int, avoid: frozenset[str], free: Sequence[str]) -> Expr:
        items: list[Expr] = []
        for _ in range(self.draw(st.integers(1, 3))):
            items.append(self.expr(depth - 1, avoid, free))
            avoid |= _names(items[-1])
            free = [axis for axis in free if axis not in _axes(items[-1])]
        return product(tuple(items))

    def concat(self, depth: int, avoid: frozenset[str], free: Sequence[str]) -> Expr:
        parts = [self.expr(depth - 1, avoid, free) for _ in range(self.draw(st.integers(1, 3)))]
        made = concat(tuple(parts))
        padded = isinstance(made, Concat) and any(isinstance(part, Pad) for part in made.parts)
        if not padded and self.draw(st.booleans()):
            align = self.draw(st.sampled_from([None, None, Number(2), Number(3)]))
            parts.insert(self.draw(st.integers(0, len(parts))), Pad(align))
        made = concat(tuple(parts))
        pads = [part for part in made.parts if isinstance(part, Pad)] if isinstance(made, Concat) else []
        assume(len(pads) < 2)
        return made

    def dim(self, avoid: frozenset[str], free: Sequence[str]) -> Dim:
        known = [name for name in self.sizes if name not in avoid]
        literals = [name for name in "1 2 3".split() if name not in avoid or name == "1"]
        name = self.draw(st.sampled_from([f"d{len(self.sizes)}"] * 3 + known + literals))
        axes = self.axes(free)
        if name.isdecimal():
            return Dim(name)
        cuts = tuple(map(Cut, axes))
        pieces = math.prod(self.mesh[axis] for axis in axes)
        if name not in self.sizes:
            even = self.draw(st.booleans())
            self.sizes[name] = self.draw(st.integers(1, 2)) * pieces if even else self.draw(st.integers(1, 5))
        size = self.sizes[name]
        if axes and self.draw(st.integers(0, 3)) == 0:
            return Dim(name, self.placed(name, size, cuts))
        if axes and (name, tuple(axes)) not in self.cuts and (size % pieces or self.draw(st.integers(0, 3)) == 0):
            self.cuts[name, tuple(axes)] = self.boundaries(size, pieces)
        return Dim(name, cuts)

    def placed(self, name: str, size: int, cuts: tuple[Cut, ...]) -> tuple[Cut, ...]:
        axis = cuts[0].axis
        if (name, axis) not in self.placements:
            order = self.draw(st.permutations(range(size)))
            at = self.boundaries(size, self.mesh[axis])
            placed = {k: tuple(order[at[k] : at[k + 1]]) for k in range(self.mesh[axis])}
            if self.draw(st.integers(0, 3)) == 0:
                placed[0] += tuple(index for index in order[at[1] :] if self.draw(st.booleans()))
            self.placements[name, axis] = placed
        held = self.placements[name, axis].values()
        rest = math.prod(self.mesh[cut.axis] for cut in cuts[1:])
        # Only what is even at every rank can be cut again.
        inner = cuts[1:] if all(len(indices) % rest == 0 for indices in held) else ()
        if (name, tuple(cut.axis for cut in inner)) in self.cuts:
            inner = ()
        return (Cut(axis, placed=True), *inner)

    def composed_cut(self, expr: Expr, free: Sequence[str]) -> Expr:
        axes = self.axes(free)
        if not axes or not isinstance(expr, Product | Concat) or expr.cuts:
            return expr
        cuts = tuple(map(Cut, axes))
        made = product((expr,), cuts)
        assert isinstance(made, Product | Concat)
        pieces = math.prod(self.mesh[axis] for axis in axes)
        lengths = self.lengths(expr)
        padded = isinstance(made, Concat) and any(isinstance(part, Pad) for part in made.parts)
        key = (cut_name(made), tuple(axes))
        if key in self.cuts:
            return made if lengths == {self.cuts[key][-1]} else expr
        if len(lengths) == 1 and self.draw(st.integers(0, 2)) == 0:
            self.cuts[key] = self.boundaries(lengths.pop() + (2 if padded else 0), pieces)
            return made
        return made if padded or all(length % pieces == 0 for length in lengths) else expr

    def boundaries(self, size: int, pieces: int) -> tuple[int, ...]:
        inner = self.draw(st.lists(st.integers(0, size), min_size=pieces - 1, max_size=pieces - 1))
        return (0, *sorted(inner), size)

    def axes(self, free: Sequence[str]) -> list[str]:
        if not free or self.draw(st.booleans()):
            return []
        count = 2 if self.draw(st.integers(0, 3)) == 0 else 1
        return self.draw(st.lists(st.sampled_from(list(free)), unique=True, min_size=1, max_size=count))

    def lengths(self, expr: Expr) -> set[int]:
        """Local lengths of `expr` over all coordinates."""
        assume(not isinstance(expr, Pad))
        return {len(read_dim(expr, self.setting(), coordinate, None)) for coordinate in self.mesh.coordinates()}

    def fixed(self, names: frozenset[str], free: Sequence[str]) -> tuple[str, ...]:
        """Leaves that are no dims of the source: a captured number, an axis of replicas."""
        found = []
        if self.draw(st.integers(0, 3)) == 0:
            self.sizes["layer"] = self.draw(st.integers(1, 3))
            found.append("layer")
        if free and self.draw(st.integers(0, 3)) == 0:
            found.append(self.draw(st.sampled_from(list(free))))
        return tuple(name for name in found if name not in names)

    def target(self, leaves: Sequence[str], fixed: Sequence[str]) -> tuple[Layout, frozenset[str]]:
        """A logical tensor with these leaves: some in its name, the others in any order and grouping."""
        order = self.draw(st.permutations([*leaves, *fixed]))
        named = frozenset(n for n in order if not n.isdecimal() and self.draw(st.integers(0, 5)) == 0)
        dims: list[list[Dim]] = []
        for name in (n for n in order if n not in named):
            composed = self.draw(st.booleans())
            if dims and composed:
                dims[-1].append(Dim(name))
            else:
                dims.append([Dim(name)])
        if self.draw(st.integers(0, 5)) == 0:
            where = self.draw(st.integers(0, len(dims)))
            dims.insert(where, [Dim("1")])
        return Layout(tuple(product(tuple(group)) for group in dims)), named


def _names(expr: Expr) -> frozenset[str]:
    match expr:
        case Dim(name=name):
            return frozenset({name})
        case Product(items=inner) | Concat(parts=inner):
            return frozenset[str]().union(*map(_names, inner))
    return frozenset()


def _axes(expr: Expr) -> frozenset[str]:
    match expr:
        case Product(items=inner, cuts=cuts) | Concat(parts=inner, cuts=cuts):
            return frozenset(cut.axis for cut in cuts).union(*map(_axes, inner))
        case Dim(cuts=cuts):
            return frozenset(cut.axis for cut in cuts)
    return frozenset()
