"""How a family of tensors lies along one axis of the mesh, as far as names, shapes and bytes tell."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ucp.lang.ast import Capture
from ucp.lang.draft_names import EXPERT, LAYER, Family
from ucp.lang.held import Held
from ucp.layout import Shape

Same = Callable[[int, int], bool | None]
"""Whether two shards (by number) hold the same: None where that cannot be told, as for shards that are all zeros."""

Kind = Literal["replica", "cut", "place", "numbers", "spread", "unlike"]
_STAGES = frozenset({"pp", "vpp", "stage", "pipe", "pipeline"})
_MOST_COMPARED = 3


@dataclass(frozen=True, slots=True)
class Along:
    """How a family lies along `axis`.

    *replica*: every coordinate holds all of it. *cut*: each holds a piece of dim `dim`, or of one that is not
    clear (None). *place*: only the coordinate `index` has it. *numbers*: the number `capture` in
    the name counts from zero on each. *spread*: each tensor is on one coordinate, under its own name. *unlike*: shapes
    differ in several dims. `doubt` says what could not be decided, or what was concluded from what.
    """

    axis: str
    kind: Kind
    dim: int | None = None
    index: int = 0
    capture: str = ""
    doubt: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known beside the shards: lengths of whole dims, `given` or `seen` in replicas, and comparison."""

    ranks: Mapping[str, int]
    given: frozenset[int]
    seen: frozenset[int]
    same: Same | None


def along(family: Family, axis: str, held: Sequence[Held], evidence: Evidence) -> Along | None:
    """How `family` lies along `axis`; None where its shards do not say at which coordinate they are."""
    by_name: dict[str, dict[int, list[int]]] = {}
    for name, numbers in family.members.items():
        for number in numbers:
            index = held[number].coordinate.get(axis)
            if index is None:
                return None
            by_name.setdefault(name, {}).setdefault(index, []).append(number)
    present = {index for places in by_name.values() for index in places}
    ranks = evidence.ranks[axis]
    if len(present) == 1 and not family.captures:
        return _place(axis, present.pop(), ranks)
    if all(len(places) == 1 for places in by_name.values()):
        return _one_each(axis, present, ranks)
    compared = _compare(by_name, evidence.same, held, axis)
    capture = _counted(family, axis, by_name)
    if capture is not None and compared is not True:
        doubt = None if compared is False else f"inferred: `{capture}` counts from zero on each `{axis}` rank"
        return Along(axis, "numbers", capture=capture, doubt=doubt)
    return _within(axis, by_name, held, compared, evidence)


def _one_each(axis: str, present: Collection[int], ranks: int) -> Along:
    if len(present) == 1:
        return _place(axis, next(iter(present)), ranks)
    doubt = f"undecided: which `{axis}` rank holds which of these, names do not show; reading needs no answer"
    return Along(axis, "spread", doubt=doubt)


def _place(axis: str, index: int, ranks: int) -> Along:
    """The last coordinate is called so: it stays the last on another mesh."""
    return Along(axis, "place", index=-1 if index == ranks - 1 else index)


def _counted(family: Family, axis: str, by_name: Mapping[str, Mapping[int, object]]) -> str | None:
    """The capture that counts anew on each coordinate, if the axis is one along which such things are counted."""
    wanted = LAYER if axis in _STAGES else EXPERT if axis == "ep" else None
    place = next((i for i, part in enumerate(family.components) if part in family.captures and _is(part, wanted)), None)
    if place is None:
        return None
    numbers: dict[int, set[int]] = {}
    for name, places in by_name.items():
        for index in places:
            numbers.setdefault(index, set()).add(int(name.split(".")[place]))
    part = family.components[place]
    whole = all(seen == set(range(len(seen))) for seen in numbers.values())
    return part.name if whole and isinstance(part, Capture) else None


def _is(part: object, wanted: str | None) -> bool:
    """Whether a capture is named for layers or experts: ``l``, ``l2`` and so on."""
    return wanted is not None and isinstance(part, Capture) and part.name.rstrip("0123456789") == wanted


def _within(
    axis: str, by_name: Mapping[str, Mapping[int, list[int]]], held: Sequence[Held], compared: bool | None, of: Evidence
) -> Along:
    """Shards of the same name at several coordinates: pieces or replicas."""
    shapes = {held[numbers[0]].shape for places in by_name.values() for numbers in places.values()}
    differing = {dim for a in shapes for b in shapes if len(a) == len(b) for dim in range(len(a)) if a[dim] != b[dim]}
    if len({len(shape) for shape in shapes}) > 1 or len(differing) > 1:
        return Along(axis, "unlike", doubt=f"undecided: shapes differ along `{axis}` in several dims")
    if differing:
        return Along(axis, "cut", differing.pop())
    shape = next(iter(shapes))
    if compared is True or not shape:
        return Along(axis, "replica")
    dim, why = _cut_dim(shape, axis, of)
    if compared is False:
        if dim is not None:
            return Along(axis, "cut", dim, doubt=why)
        doubt = f"undecided: shards differ along `{axis}`; write `/{axis}` at the dim that is cut"
        return Along(axis, "cut", None, doubt=doubt)
    if dim is not None and why is None:
        return Along(axis, "cut", dim, doubt=f"inferred: `{axis}` cuts where that gives a size that was given")
    doubt = f"undecided: replicas along `{axis}`, or cut? Taken for replicas, which are compared"
    return Along(axis, "replica", doubt=doubt)


def _cut_dim(shape: Shape, axis: str, of: Evidence) -> tuple[int | None, str | None]:
    """The dim that `axis` cuts, if it does, and the ground where it is a weak one."""
    ranks = of.ranks[axis]
    given = [d for d, n in enumerate(shape) if n * ranks in of.given and n not in of.given]
    if len(given) == 1:
        return given[0], None
    if len(shape) == 1:
        return 0, f"inferred: `{axis}` cuts where shards differ and have one dim"
    free = [d for d, n in enumerate(shape) if n not in of.seen | of.given]
    if len(free) == 1:
        whole = " and ".join(str(n) for n in shape if n in of.seen | of.given)
        where = f"at the other dim if one has the whole length {whole}"
        return free[0], f"inferred: `{axis}` cuts where shards differ, {where}"
    return None, None


def _compare(
    by_name: Mapping[str, Mapping[int, list[int]]], same: Same | None, held: Sequence[Held], axis: str
) -> bool | None:
    """Whether shards at different coordinates of `axis`, and the same on all others, hold the same."""
    if same is None:
        return None
    told: list[bool] = []
    several = [places for places in by_name.values() if len(places) > 1]
    for places in several[:_MOST_COMPARED]:
        first, second = min(places), max(places)
        pair = _pair(places[first], places[second], held, axis)
        found = same(*pair) if pair and held[pair[0]].shape == held[pair[1]].shape else None
        if found is not None:
            told.append(found)
    return None if not told else all(told)


def _pair(first: Sequence[int], second: Sequence[int], held: Sequence[Held], axis: str) -> tuple[int, int] | None:
    def rest(number: int) -> dict[str, int]:
        return {name: index for name, index in held[number].coordinate.items() if name != axis}

    return next(((a, b) for a in first for b in second if rest(a) == rest(b)), None)
