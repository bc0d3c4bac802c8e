"""Consolidation: catalogs of mesh coordinates, seen through a conversion program, as one catalog of logical tensors.

Nothing is read: the fragments of the parts are composed with the blocks that the program gives, and from then on the
catalog is like any other. It can be opened, loaded and converted, and its replicas are compared as it is read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import cast

from ucp.catalog import Catalog, ProgramRecord, Scalar, Tensor
from ucp.errors import ConflictError, FitError, UsageError
from ucp.lang import Program, to_json
from ucp.lang.bind import Bound, Held, Piece, bind
from ucp.layout import Box, Mesh
from ucp.layout.block import Block
from ucp.mapping import around
from ucp.mapping.around import Part, told
from ucp.mapping.ties import Shards, bind_tied
from ucp.plan import Fragment, Key, Reduction, TensorSpec
from ucp.plan.compose import compose
from ucp.plan.views import spelled_out

_FEW = 32
"""Fragments that are not worth an index."""

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
"""What can be cast into each other as it is read."""


def consolidate(
    parts: Sequence[Part],
    program: Program,
    *,
    mesh: Mesh,
    sizes: Mapping[str, int] | None = None,
    config: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    cuts: Mapping[tuple[str, tuple[str, ...]], tuple[int, ...]] | None = None,
    placements: Mapping[tuple[str, str], Mapping[int, tuple[int, ...]]] | None = None,
) -> Catalog:
    """One catalog of the logical tensors of `program` from `parts`: (coordinate on `mesh`, what is held there).

    All parts lie in one store. A part may itself be whole or be held in ZeRO's flat ranges; axes that its coordinate
    leaves out are not distinguished. One part on a mesh without axes is a checkpoint whose tensors are renamed, split
    or put in another order. `sizes`, `config`, `flags`, `cuts` and `placements` are those of `ucp.lang.bind.bind`.

    Optimizer states follow their tensors, as do low-precision copies, numbers per parameter and param groups. Copies on
    several coordinates are replicas, compared when they are read. What the coordinates' training states say alike is
    kept once, all else under ``name@axis=index,...``.

    ProgramError and FitError as `bind` raises them; FitError for a cast that is none; ConflictError where coordinates
    contradict each other in steps, numbers per parameter, kinds or hyper-parameters.
    """
    if not parts:
        raise UsageError("nothing to consolidate")

    def bound_to(held: Sequence[Held], flags: Mapping[str, bool]) -> Bound:
        return bind(program, held, mesh=mesh, sizes=sizes, config=config, flags=flags, cuts=cuts, placements=placements)

    bound, shards = bind_tied(parts, program, bound_to, flags)
    made = _Consolidation(parts, shards, bound)
    first = parts[0][1]
    return replace(
        first,
        source=replace(first.source, mesh=mesh) if mesh.axes else first.source,
        tensors=made.tensors(),
        fragments={key: made.fragments(key) for key in made.keys},
        views={key: bound.tensors[key].view for key in made.keys},
        reductions={Key(*key): cast("Reduction", kind) for key, kind in bound.reduces.items()},
        witnesses=made.witnesses(),
        ties=dict(bound.ties),
        program=ProgramRecord(to_json(program), mesh, dict(bound.sizes), dict(bound.flags)),
        step=around.step(parts),
        param_groups=around.param_groups(parts, made.targets),
        state=around.state(parts, mesh),
        checksums=around.checksums(parts),
        objects=around.objects(parts),
        notes=(*around.notes(parts), *made.notes()),
        options=around.options(parts),
    )


@dataclass
class _Consolidation:
    """A program bound to the parts."""

    parts: Sequence[Part]
    shards: Shards
    bound: Bound

    @cached_property
    def keys(self) -> list[Key]:
        """Every state of every logical tensor."""
        return [Key(*key) for key in self.bound.tensors]

    @cached_property
    def sources(self) -> dict[str, list[tuple[int, str]]]:
        """For each logical tensor, the (part, tensor) that hold something of it, in order."""
        found: dict[str, dict[tuple[int, str], None]] = {}
        for key in self.keys:
            origins = (self.shards.origin[piece.held] for piece in self.bound.pieces[key])
            found.setdefault(key.name, {}).update({(number, held.name): None for number, held in origins})
        return {name: list(origins) for name, origins in found.items()}

    @cached_property
    def targets(self) -> dict[tuple[int, str], list[str]]:
        """For each tensor of each part, the logical tensors that it holds something of."""
        found: dict[tuple[int, str], list[str]] = defaultdict(list)
        for name, origins in self.sources.items():
            for origin in origins:
                found[origin].append(name)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The logical tensors, in the order in which the program found them."""
        states: dict[str, dict[str, TensorSpec]] = {}
        for key in self.keys:
            logical = self.bound.tensors[key]
            states.setdefault(key.name, {})[key.state] = TensorSpec(logical.shape, logical.dtype)
        return {name: self._tensor(name, held) for name, held in states.items()}

    def _tensor(self, name: str, states: Mapping[str, TensorSpec]) -> Tensor:
        first = self.bound.tensors.get((name, "value")) or self.bound.tensors[name, next(iter(states))]
        held = [(self._where(origin), self._source(origin)) for origin in self.sources[name]]
        kinds = {tensor.kind for _, tensor in held}
        if len(kinds) > 1:
            raise ConflictError(f"{name}: is made of tensors of different kinds: {' and '.join(sorted(kinds))}")
        undecided = next((tensor.undecided for _, tensor in held if tensor.undecided is not None), None)
        return Tensor(name, kinds.pop(), states, _scalars(name, held), first.dims, undecided)

    def _source(self, origin: tuple[int, str]) -> Tensor:
        return self.parts[origin[0]][1].tensors[origin[1]]

    def _where(self, origin: tuple[int, str]) -> str:
        return f"{origin[1]}{told(self.parts[origin[0]][0])}"

    def fragments(self, key: Key) -> tuple[Fragment, ...]:
        """Where the elements of one state lie."""
        spec, found = self.bound.tensors[key], []
        for piece in self.bound.pieces[key]:
            number, source = self.shards.origin[piece.held]
            _check_cast(key, self.shards.held[piece.held].dtype, spec.dtype)
            held = self.parts[number][1].fragments[source]
            found += list(self._composed(key, piece, held))
        return tuple(found)

    def witnesses(self) -> dict[str, tuple[TensorSpec, tuple[Fragment, ...]]]:
        """Low-precision copies of the values whose shards all have one, in one dtype."""
        found = {}
        for key in self.keys:
            if key.state == "value" and key not in self.bound.reduces:
                witness = self._witness(key)
                if witness is not None:
                    found[key.name] = witness
        return found

    def _witness(self, key: Key) -> tuple[TensorSpec, tuple[Fragment, ...]] | None:
        fragments, dtypes = [], set()
        for piece in self.bound.pieces[key]:
            number, source = self.shards.origin[piece.held]
            catalog = self.parts[number][1]
            exact = catalog.tensors[source.name].states["value"].dtype == self.bound.tensors[key].dtype
            if piece.replica:
                continue
            if source.name not in catalog.witnesses or not exact:
                return None
            spec, held = catalog.witnesses[source.name]
            dtypes.add(spec.dtype)
            fragments += list(self._composed(key, piece, held))
        if len(dtypes) != 1:
            return None
        return TensorSpec(self.bound.tensors[key].shape, dtypes.pop()), tuple(fragments)

    def _composed(self, key: Key, piece: Piece, fragments: Sequence[Fragment]) -> Iterator[Fragment]:
        """`fragments` of a shard inside a piece of it; replicas of a replica get numbers of their own."""
        number, source = self.shards.origin[piece.held]
        catalog, shape = self.parts[number][1], self.shards.held[piece.held].shape
        if catalog.reductions.get(source) is not None:
            raise FitError(f"{source}: is a {catalog.reductions[source]} already", hint="convert the source first")
        numbers = 1 + max((fragment.replica for fragment in fragments), default=0)
        view, own = self.bound.tensors[key].view, catalog.views.get(source)
        for fragment in self._near(fragments, piece.block):
            replica = piece.replica * numbers + fragment.replica
            for plain in [fragment] if own is None else spelled_out(fragment, own):
                yield from compose(plain, piece.block, shape, view=view, replica=replica, term=piece.term)

    def _near(self, fragments: Sequence[Fragment], block: Block) -> Sequence[Fragment]:
        """Those that may hold something of `block`: a stacked tensor has the fragments of all its layers."""
        if len(fragments) < _FEW or not block.start:
            return fragments
        if id(fragments) not in self._sorted:
            self._sorted[id(fragments)] = _by_first_dim(fragments)
        index = self._sorted[id(fragments)]
        if index is None:
            return fragments
        starts, ends, order = index
        reach = [(n - 1) * step for n, (dim, step) in zip(block.box.shape, block.steps, strict=True) if dim == 0]
        low, high = (block.start[0] + sum(limit(0, step) for step in reach) for limit in (min, max))
        return [fragments[i] for i in order[bisect_right(ends, low) : bisect_right(starts, high)]]

    @cached_property
    def _sorted(self) -> dict[int, tuple[list[int], list[int], list[int]] | None]:
        return {}

    def notes(self) -> Iterator[str]:
        """What the program left out, and what is no longer what any rank held."""
        gone = sorted({self.shards.held[number].name for number in self.bound.dropped})
        if gone:
            yield f"the program drops {_counted(gone)}"
        for kind in sorted(set(self.bound.reduces.values())):
            made = dict.fromkeys(name for (name, _), found in self.bound.reduces.items() if found == kind)
            yield f"the {kind} of what ranks hold: {_counted(list(made))}"


def _by_first_dim(fragments: Sequence[Fragment]) -> tuple[list[int], list[int], list[int]] | None:
    """Starts, furthest stops so far, and numbers of boxes in order of their first dim; None if some are no boxes."""
    boxes = [fragment.region for fragment in fragments]
    held = sorted((box.start[0], box.stop[0], i) for i, box in enumerate(boxes) if isinstance(box, Box))
    if len(held) < len(fragments):
        return None
    return [start for start, _, _ in held], list(accumulate((stop for _, stop, _ in held), max)), [i for *_, i in held]


def _counted(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)}, {' '.join(names[:3])}{more}"


def _check_cast(key: Key, source: str, target: str) -> None:
    if source != target and not {source, target} <= _FLOATS:
        raise FitError(f"{key}: held in {source}, which is not cast to {target}", hint="write its own dtype")


def _scalars(name: str, held: Sequence[tuple[str, Tensor]]) -> dict[str, Scalar]:
    """The numbers that all tensors `held`, with where they lie, keep alike; ConflictError where they do not."""
    where, first = held[0]
    for other, tensor in held[1:]:
        for key in sorted({*first.scalars, *tensor.scalars}):
            one, two = first.scalars.get(key), tensor.scalars.get(key)
            if one != two and repr(one) != repr(two):  # NaN is like NaN
                raise ConflictError(
                    f"{name}: {key} is {_shown(one)} in {where} but {_shown(two)} in {other}",
                    hint="the ranks saved different steps, or files of two saves are mixed",
                )
    return dict(first.scalars)


def _shown(scalar: Scalar | None) -> str:
    return "not there" if scalar is None else f"{scalar.value} ({scalar.dtype})"
