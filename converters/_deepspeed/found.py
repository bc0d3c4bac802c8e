"""What the reader of an optimizer hands back: states by parameter name, and whatever it could not place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ucp.catalog import ParamGroup, Scalar
from ucp.errors import ConflictError, CorruptError
from ucp.layout import FlatRange, Shape
from ucp.plan import Extent, Fragment, TensorSpec
from ucp.tree import Tree

from . import nodes
from .load import MIXED_HINT
from .same import Comparison


@dataclass(frozen=True, slots=True)
class Stored:
    """One state of one parameter: its own shape and dtype, and where it lies."""

    spec: TensorSpec
    fragments: tuple[Fragment, ...]


@dataclass(slots=True)
class Found:
    """What the optimizer of one model-parallel rank holds.

    `shapes` has every optimized parameter in the optimizer's order; `states` is by name and state; `rest` is, by
    data-parallel rank, what is in the files beside it. `undecided` are parameters that it may own or not, each with
    what would settle it; `tied` are those of which several pipeline stages hold a copy, where names do not say so.
    `degrees` are the expert-parallel degrees of native mixtures of experts.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    states: dict[str, dict[str, Stored]] = field(default_factory=dict)
    scalars: dict[str, dict[str, Scalar]] = field(default_factory=dict)
    groups: list[ParamGroup] = field(default_factory=list)
    rest: dict[int, dict[str, Tree]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    undecided: dict[str, str] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    degrees: set[int] = field(default_factory=set)

    def add(self, name: str, state: str, stored: Stored) -> None:
        """One more state of a parameter."""
        self.states.setdefault(name, {})[state] = stored

    def adopt(self, held: Found, names: Mapping[str, str]) -> None:
        """Take over the parameters of `held` under other `names`."""
        for name, shape in held.shapes.items():
            self.shapes[names[name]] = shape
            self.states[names[name]] = held.states[name]
            if name in held.scalars:
                self.scalars[names[name]] = held.scalars[name]

    def adopt_stacked(self, held: Found, name: str, part: int, parts: int) -> None:
        """Take over one parameter of `held`, which is number `part` of equal `parts` along the first dim of it."""
        shape = held.shapes[name]
        self.shapes[name] = (parts * shape[0], *shape[1:])
        states = self.states.setdefault(name, {})
        for state, stored in held.states[name].items():
            spec = TensorSpec((parts * shape[0], *shape[1:]), stored.spec.dtype)
            before = states[state].fragments if state in states else ()
            if state in states and states[state].spec != spec:
                raise CorruptError(f"{name}: ranks hold {state} as {spec.dtype} and {states[state].spec.dtype}")
            states[state] = Stored(spec, (*before, *(_moved(f, part * stored.spec.size) for f in stored.fragments)))
        self.scalars[name] = held.scalars.get(name, {})


def _moved(fragment: Fragment, by: int) -> Fragment:
    region = fragment.region
    assert isinstance(region, FlatRange)
    return replace(fragment, region=FlatRange(region.start + by, region.length))


class Layout(Protocol):
    """How a group's parameters lie in the ranks' flat tensors."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes by parameter name."""

    def held(self, rank: int) -> int:
        """Elements that the rank must have."""

    def fits(self, rank: int, length: int) -> bool:
        """Whether a flat tensor of `length` elements is like the rank's partition."""

    def fragments(self, parts: Sequence[Extent]) -> dict[str, tuple[Fragment, ...]]:
        """Where every parameter lies in the ranks' flat tensors."""


def place_group(
    found: Found, layout: Layout, states: Sequence[Mapping[str, Tree]], comparison: Comparison, where: str
) -> list[dict[str, Tree]]:
    """Put the optimizer states of one flat group, one dict per rank, in their places in `found`.

    A tensor that is flat like the partition is a state of every parameter, a number is one scalar of each. Gives for
    each rank what is neither, and what calls itself ``value``, which is the master's name.

    ConflictError if ranks stand at different steps, CorruptError if a rank lacks a state that others have.
    """
    left: list[dict[str, Tree]] = [{} for _ in states]
    for key in dict.fromkeys(key for state in states for key in state):
        values = [state.get(key) for state in states]
        lacking = [rank for rank, state in enumerate(states) if key not in state and layout.held(rank)]
        if lacking:
            raise CorruptError(f"{where}: rank {lacking[0]} has no {key}, which other ranks have", hint=MIXED_HINT)
        if str(key) != "value" and _is_flat(layout, values):
            place(found, layout, str(key), values, f"{where} {key}")
        elif (scalar := _common_scalar(str(key), values, comparison, where)) is not None:
            for name in layout.shapes:
                found.scalars.setdefault(name, {})[str(key)] = scalar
        else:
            for rank, state in enumerate(states):
                if key in state:
                    left[rank][key] = state[key]
    return left


def place(found: Found, layout: Layout, state: str, values: Sequence[Tree], where: str) -> None:
    """Put the ranks' flat tensors of one state in their places in `found`."""
    leaves = [value for value in values if nodes.is_tensor(value)]
    dtypes = {leaf.extent.dtype for leaf in leaves}
    if len(dtypes) != 1:
        raise CorruptError(f"{where}: ranks hold it as {' and '.join(sorted(dtypes))}")
    parts = [nodes.tensor(value, where).extent if value is not None else leaves[0].extent for value in values]
    dtype = dtypes.pop()
    for name, fragments in layout.fragments(parts).items():
        found.add(name, state, Stored(TensorSpec(layout.shapes[name], dtype), fragments))


def _is_flat(layout: Layout, values: Sequence[Tree]) -> bool:
    """Whether every rank that holds elements has a flat tensor like its partition."""
    flat = False
    for rank, value in enumerate(values):
        if value is None and not layout.held(rank):
            continue
        if not nodes.is_tensor(value) or len(value.extent.shape) != 1 or not layout.fits(rank, value.extent.size):
            return False
        flat = True
    return flat


def _common_scalar(key: str, values: Sequence[Tree], comparison: Comparison, where: str) -> Scalar | None:
    scalars = {scalar_of(value, comparison) for value in values}
    if len(scalars) == 1:
        return scalars.pop()
    if key == "step" and None not in scalars:
        steps = " and ".join(sorted({str(scalar.value) for scalar in scalars if scalar}))
        raise ConflictError(
            f"{where}: ranks stand at different steps ({steps})",
            hint=MIXED_HINT,
        )
    return None


def scalar_of(value: Tree, comparison: Comparison) -> Scalar | None:
    """A Python number, or the value of a tensor of no dims; None for anything else."""
    if nodes.is_number(value):
        return Scalar(value, type(value).__name__)
    if nodes.is_tensor(value) and value.extent.shape == ():
        return Scalar(comparison.scalar(value), value.extent.dtype)
    return None
