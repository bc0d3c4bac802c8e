"""The blocks of one shard under its rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ucp.errors import FitError
from ucp.lang.ast import Pattern, Reduce, State
from ucp.lang.check import Checked, Ready
from ucp.lang.choose import Match
from ucp.lang.held import Held
from ucp.lang.match import captures, computed, describe, spell
from ucp.lang.solve import Solver, cuts_in, names_in, require
from ucp.lang.sums import evaluate
from ucp.layout import Box, Shape
from ucp.layout.block import NO_STEP, Block, View
from ucp.layout.branches import axes, without_dims
from ucp.layout.compile import Compiled, Placed, compile_layout, globalize
from ucp.layout.dtypes import WORDS
from ucp.layout.expr import Concat, Dim, Expr, Layout, Pad, Product
from ucp.layout.pads import Pads, saved_pads
from ucp.layout.setting import Setting
from ucp.layout.spell import spell as spell_dim


@dataclass(frozen=True, slots=True)
class Part:
    """A block of the logical tensor `name` in a shard, if it holds any of it, and what the rule says of the tensor."""

    name: str
    rule: int
    block: Block | None
    view: View
    dims: tuple[str, ...]
    dtype: str
    reduce: Reduce | None
    pads: tuple[int, ...]
    """Sizes of the padding that cuts go through, before them: the same in every shard of a tensor."""


@dataclass(frozen=True, slots=True)
class Form:
    """A rule as it applies to one state: without the dims that the state lacks, or with a layout of its own."""

    layout: Layout | None
    targets: tuple[Layout, ...] | None
    parts: tuple[int, ...] | None
    each: tuple[str, ...]
    reduce: Reduce | None
    axes: tuple[str, ...]
    cut_pads: frozenset[tuple[int, int]]
    """Paddings, by dim and number in it, that are cut over ranks, beside nothing that is; others may differ by rank."""
    texts: tuple[tuple[str, ...], ...]
    own: bool
    """Whether the state has a layout of its own: then numbers in names are none of its dims."""


@dataclass
class Compiler:
    """Compiles shards, and keeps what equal shards share."""

    checked: Checked
    solver: Solver
    setting: Setting
    flags: Mapping[str, bool]
    _forms: dict[tuple[int, str], Form] = field(default_factory=dict)
    _kept: dict[tuple[object, ...], Compiled] = field(default_factory=dict)
    _pads: dict[tuple[object, ...], Pads] = field(default_factory=dict)
    _states: dict[str, State | None] = field(default_factory=dict)
    _parts: dict[tuple[object, ...], tuple[Part, ...]] = field(default_factory=dict)
    _axes: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def compile(self, shard: Held, match: Match) -> tuple[Part, ...]:
        """Every region that the shard holds. Replicas share what is compiled.

        FitError for a state that the program does not know, a tensor in a wrong place, a shape that the sizes do not
        give, or a size that is not known.
        """
        assert match.rule is not None
        at = tuple([shard.coordinate.get(axis) for axis in self.relevant(self.checked.rules[match.rule])])
        key = (shard.name, shard.state, shard.shape, shard.dtype, at)
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = tuple(self._compile_one(shard, match, self.checked.rules[match.rule]))
        return found

    def relevant(self, ready: Ready) -> tuple[str, ...]:
        """Axes on which it matters where a tensor of the rule lies."""
        number = ready.equation.number
        if number not in self._axes:
            self._axes[number] = self._relevant(ready)
        return self._axes[number]

    def _relevant(self, ready: Ready) -> tuple[str, ...]:
        places = {place.axis for place in ready.equation.on}
        states = self.checked.flat.states
        own = {axis for state in states for axis in (*state.each, *(axes(state.layout) if state.layout else ()))}
        fine = ready.axes | places | own
        coarse = {factor.axis for factor in self.checked.flat.factors if fine & set(factor.parts)}
        return tuple(sorted(fine | coarse))

    def _compile_one(self, shard: Held, match: Match, ready: Ready) -> Iterator[Part]:
        form = self.form(ready, shard)
        coordinate = self.solver.coordinate(shard.coordinate)
        self._in_place(ready, shard, coordinate)
        values = self._values(ready, match, coordinate, shard)
        leaves = frozenset[str]() if form.own else ready.leaves
        fixed = {name: value for name, value in values.items() if name in leaves and isinstance(value, int)}
        for axis in {*ready.axis_leaves, *form.each}:
            fixed[axis] = self.setting.index(axis, coordinate)
            values[axis] = fixed[axis]
        compiled, pads = self._compiled(ready, form, shard, coordinate, fixed)
        dtypes = self._dtypes(ready, form, shard)
        for k, (side, found) in enumerate(zip(ready.equation.targets, compiled.blocks, strict=True)):
            stacked = ready.named[k] - ready.leaves if ready.named else frozenset()
            if not found and stacked:
                continue
            # A shard that holds nothing still says that there is such a tensor.
            placed_blocks: tuple[Placed | None, ...] = found or (None,)
            self._compute(side.name, values)
            name = "" if any(placed.names for placed in found) else spell(side.name, values)
            for placed in placed_blocks:
                own = name or spell(side.name, {**values, **dict(placed.names if placed else ())})
                yield Part(
                    own,
                    ready.equation.number,
                    placed.block if placed else None,
                    compiled.views[k],
                    form.texts[k] or _plain_texts(shard),
                    dtypes[k],
                    form.reduce,
                    tuple(size for place, size in pads.items() if place in form.cut_pads),
                )

    def wanted(
        self,
        ready: Ready,
        values: Mapping[str, int | str],
        coordinate: Mapping[str, int],
        shard: Held,
        logical: Mapping[str, Shape],
    ) -> tuple[Shape, list[tuple[str, View, Block]]]:
        """Local shape of a tensor that a rule makes, and the logical name, view and block of each part of it.

        `values` are the captured ones over the whole model. Of `shard` the name, state and shape are looked at, of the
        shapes of `logical` tensors those that have no layout. A shape of ``()`` says nothing: then the padding is the
        smallest that fits.
        """
        form = self.form(ready, shard)
        if form.layout is None or form.targets is None:
            self._compute(ready.equation.targets[0].name, known := dict(values))
            whole = spell(ready.equation.targets[0].name, known)
            same = _identity(logical[whole], 1)
            return same.shape, [(whole, same.views[0], same.blocks[0][0].block)]
        state = shard.state
        leaves = frozenset[str]() if form.own else ready.leaves
        fixed = {leaf: value for leaf, value in values.items() if leaf in leaves and isinstance(value, int)}
        for axis in {*ready.axis_leaves, *form.each}:
            fixed[axis] = self.setting.index(axis, coordinate)
        at = tuple((axis, coordinate.get(axis)) for axis in form.axes)
        known_shape = shard.shape if len(shard.shape) == len(form.layout.dims) else ()
        key = ("wanted", ready.equation.number, state, known_shape, at, tuple(fixed.items()))
        if key not in self._kept:
            self._require(form, shard)
            try:
                pad = None
                if known_shape:
                    pad = saved_pads(form.layout, known_shape, setting=self.setting, coordinate=coordinate)
                self._kept[key] = self._at(ready, form, coordinate, fixed, pad)
            except FitError as error:
                raise FitError(f"{shard}: {error.message}", hint=error.hint) from None
        compiled = self._kept[key]
        found = []
        for side, view, blocks in zip(ready.equation.targets, compiled.views, compiled.blocks, strict=True):
            known = {**values, **{axis: fixed[axis] for axis in ready.axis_leaves}}
            self._compute(side.name, known)
            found += [(spell(side.name, {**known, **dict(p.names)}), view, p.block) for p in blocks]
        return compiled.shape, found

    def targets(self, ready: Ready, values: Mapping[str, int | str]) -> tuple[str, ...]:
        """Names of the logical tensors that a rule makes a tensor of, but those stacked along a dim of it."""
        names = []
        for k, side in enumerate(ready.equation.targets):
            if not ready.named or not ready.named[k] - ready.leaves:
                self._compute(side.name, known := dict(values))
                if all(capture.name in known for capture in captures(side.name)):
                    names.append(spell(side.name, known))
        return tuple(names)

    def form(self, ready: Ready, shard: Held) -> Form:
        """The rule as it applies to the shard's state."""
        key = (ready.equation.number, shard.state)
        if key not in self._forms:
            self._forms[key] = self._form(ready, self._state(shard))
        return self._forms[key]

    def _state(self, shard: Held) -> State | None:
        """What the program says of the state; None for ``value``, or for a state that lies like it by default."""
        if shard.state in self._states:
            return self._states[shard.state]
        states = self.checked.flat.states
        found = next((state for state in states if shard.state in state.names), None)
        found = found or next((state for state in states if "*" in state.names), None)
        if shard.state != "value" and found is None:
            known = " ".join(name for state in states for name in state.names)
            raise FitError(
                f"{shard}: {self.checked.program.file} does not say how the state {shard.state!r} lies",
                hint=f"add `state {shard.state} : like param`" + (f"; it knows {known}" if known else ""),
            )
        self._states[shard.state] = None if shard.state == "value" else found
        return self._states[shard.state]

    def _form(self, ready: Ready, state: State | None) -> Form:
        layout, targets = ready.layout, ready.targets
        parts: tuple[int, ...] | None = None
        count = len(ready.equation.targets)
        reduces = state.reduces if state and state.reduces else ready.equation.reduces
        reduce = Reduce(reduces[0].kind, tuple(axis for one in reduces for axis in one.axes)) if reduces else None
        each = state.each if state else ()
        if state and state.layout is not None:
            layout = state.layout
            plain = Layout(tuple(Dim(name) for dim in layout.dims for name in sorted(names_in(dim))))
            targets, parts = (plain,) * count, (0,) * count
        elif state and state.lacking and layout is not None and targets is not None:
            layout, targets, parts = without_dims(layout, targets, state.lacking)
        if each and targets is None:
            raise FitError(
                f"{self.checked.where(ready.equation)}: a state that each {' '.join(each)} has of its own needs dims",
                hint="give the tensor a layout",
            )
        if each and targets is not None:
            targets = tuple(Layout((*(Dim(axis) for axis in each), *t.dims), t.dtype) for t in targets)
        texts = tuple(tuple(spell_dim(dim) for dim in t.dims) for t in targets or ()) or ((),) * count
        cutting = axes(layout) if layout else ()
        own = state is not None and state.layout is not None
        if own and any(named - ready.leaves for named in ready.named):
            raise FitError(
                f"{self.checked.where(ready.equation)}: a state with a layout of its own, of a tensor that is stacked",
                hint="what is stacked shares it: `drop` such tensors, or keep the state as a number",
            )
        return Form(layout, targets, parts, each, reduce, cutting, _cut_pads(layout), texts, own)

    def _in_place(self, ready: Ready, shard: Held, coordinate: Mapping[str, int]) -> None:
        for place in ready.equation.on:
            here, wanted = coordinate.get(place.axis), self.setting.place(place.axis, place.index)
            if here is not None and here != wanted:
                raise FitError(
                    f"{shard}: {self.checked.where(ready.equation)} puts it on {place.axis} {wanted} alone",
                    hint="remove the `on` if other ranks may hold it too",
                )

    def _values(self, ready: Ready, match: Match, coordinate: Mapping[str, int], shard: Held) -> dict[str, int | str]:
        """Captured values over the whole model: local numbers become global."""
        values = dict(match.values)
        for capture in captures(ready.equation.source):
            local = values[capture.name]
            if capture.cuts and isinstance(local, int):
                require(self.solver, [capture.name], str(shard))
                values[capture.name] = globalize(capture.name, capture.cuts, local, self.setting, coordinate)
            elif capture.name in self.solver.mesh and coordinate.get(capture.name, local) != local:
                raise FitError(f"{shard}: its name says {capture.name} {local}")
        for k, place in enumerate(computed(ready.equation.source)):
            wanted = evaluate(place.value, self.solver.value)
            if wanted is None:
                raise FitError(f"{shard}: the number in its name needs a size that is not known")
            if values.pop(f"={k}") != wanted:
                raise FitError(f"{shard}: {describe(ready.equation.source)} is {wanted} here; no other rule matches it")
        return values

    def _compute(self, pattern: Pattern, values: dict[str, int | str]) -> None:
        for k, place in enumerate(computed(pattern)):
            value = evaluate(place.value, self.solver.value)
            if value is None or value.denominator != 1:
                raise FitError(f"{describe(pattern)}: its number is not known")
            values[f"={k}"] = int(value)

    def _compiled(
        self, ready: Ready, form: Form, shard: Held, coordinate: Mapping[str, int], fixed: Mapping[str, int]
    ) -> tuple[Compiled, Pads]:
        if form.layout is None or form.targets is None:
            return _identity(shard.shape, len(ready.equation.targets)), {}
        at = tuple((axis, coordinate.get(axis)) for axis in form.axes)
        key = (ready.equation.number, shard.state, shard.shape, at, tuple(fixed.items()))
        if key not in self._kept:
            self._require(form, shard)
            self._kept[key], self._pads[key] = self._compile(ready, form, shard, coordinate, fixed)
        return self._kept[key], self._pads[key]

    def _compile(
        self, ready: Ready, form: Form, shard: Held, coordinate: Mapping[str, int], fixed: Mapping[str, int]
    ) -> tuple[Compiled, Pads]:
        assert form.layout is not None and form.targets is not None
        if len(form.layout.dims) != len(shard.shape):
            raise FitError(f"{shard} has shape {list(shard.shape)}, but its layout has {len(form.layout.dims)} dims")
        try:
            pad = saved_pads(form.layout, shard.shape, setting=self.setting, coordinate=coordinate)
            compiled = self._at(ready, form, coordinate, fixed, pad)
        except FitError as error:
            raise FitError(f"{shard} {list(shard.shape)}: {error.message}", hint=error.hint) from None
        if compiled.shape != shard.shape:
            raise FitError(
                f"{shard} has shape {list(shard.shape)}, but {self.checked.where(ready.equation)} gives it "
                f"{list(compiled.shape)}",
                hint="with " + " ".join(f"{name}={n}" for name, n in sorted(self._sizes_of(form).items())),
            )
        return compiled, pad

    def _require(self, form: Form, shard: Held) -> None:
        """Every size in the layouts must be known."""
        layouts = (form.layout, *(form.targets or ()))
        dims = (dim for layout in layouts if layout is not None for dim in layout.dims)
        require(self.solver, {name for dim in dims for name in names_in(dim)}, str(shard))

    def _at(
        self, ready: Ready, form: Form, coordinate: Mapping[str, int], fixed: Mapping[str, int], pad: Pads | None
    ) -> Compiled:
        assert form.layout is not None and form.targets is not None
        return compile_layout(
            form.layout,
            form.targets,
            setting=self.setting,
            coordinate=coordinate,
            fixed=fixed,
            captured=() if form.own else ready.named,
            pad=pad,
            parts=form.parts,
        )

    def _sizes_of(self, form: Form) -> dict[str, int]:
        assert form.layout is not None
        names = {name for dim in form.layout.dims for name in names_in(dim) if not name.isdecimal()}
        return {name: self.setting.number(name) for name in names}

    def _dtypes(self, ready: Ready, form: Form, shard: Held) -> tuple[str, ...]:
        """Dtype of each logical tensor. A cast is of the value alone; states keep theirs."""
        count = len(ready.equation.targets)
        if shard.state != "value":
            said = form.layout.dtype if form.own and form.layout is not None else None
            if said is not None and WORDS[said] != shard.dtype:
                raise FitError(f"{shard} is {shard.dtype}, but {self.checked.program.file} says {said} of the state")
            return (shard.dtype,) * count
        written = ready.equation.layout.dtype if ready.equation.layout else None
        if written is not None and WORDS[written] != shard.dtype:
            raise FitError(f"{shard} is {shard.dtype}, but {self.checked.where(ready.equation)} says {written}")
        targets = [side.layout.dtype if side.layout else None for side in ready.equation.targets]
        odd = next((word for word in targets if word is not None and WORDS[word] != shard.dtype), None)
        if written is None and odd is not None:
            raise FitError(
                f"{shard} is {shard.dtype}, but {self.checked.where(ready.equation)} says {odd} of what it makes",
                hint="to cast, say the element type on both sides, and `lossy` if digits may be lost",
            )
        return tuple(shard.dtype if word is None else WORDS[word] for word in targets)


def _cut_pads(layout: Layout | None) -> frozenset[tuple[int, int]]:
    return frozenset(
        (number, k)
        for number, dim in enumerate(layout.dims if layout is not None else ())
        for k, is_cut in enumerate(_pads_in(dim, is_cut=False))
        if is_cut
    )


def _pads_in(expr: Expr, *, is_cut: bool) -> Iterator[bool]:
    """For each padding in order, whether a cut goes through it and all that stands beside it is whole."""
    if isinstance(expr, Pad):
        yield is_cut
    elif isinstance(expr, Product | Concat):
        whole = bool(expr.cuts) and len(cuts_in(expr)) == len(expr.cuts)
        for part in expr.items if isinstance(expr, Product) else expr.parts:
            yield from _pads_in(part, is_cut=is_cut or whole)


def _identity(shape: Shape, count: int) -> Compiled:
    """A tensor that is mapped one to one, whatever its shape."""
    steps = tuple((dim, 1) if n > 1 else NO_STEP for dim, n in enumerate(shape))
    placed = Placed(Block(Box.whole(shape), (0,) * len(shape), steps))
    return Compiled(shape, (View.plain(shape),) * count, ((placed,),) * count)


def _plain_texts(shard: Held) -> tuple[str, ...]:
    return tuple(str(n) for n in shard.shape)
