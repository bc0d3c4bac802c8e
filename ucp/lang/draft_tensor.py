"""How the families of a checkpoint lie on its mesh, decided as far as names, shapes and bytes go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ucp.lang.ast import Capture
from ucp.lang.draft_axes import Along, Evidence, Same, along
from ucp.lang.draft_dims import is_norm
from ucp.lang.draft_known import Known
from ucp.lang.draft_marks import fused
from ucp.lang.draft_names import Family
from ucp.lang.held import Held
from ucp.layout import Mesh, Shape


@dataclass
class Tensor:
    """A family on its way to a rule. `shape` is the local one of the first shard; None where members differ in it."""

    family: Family
    shape: Shape | None
    whole: Shape | None
    found: list[Along]
    known: list[Known]
    odd: str | None = None
    """A state with a shape of its own."""
    partial: bool = False
    """Whether others under the same numbers, of the same layer say, are there without it."""

    @property
    def cuts(self) -> list[Along]:
        """What cuts it along a dim that is known."""
        return [one for one in self.found if one.kind == "cut" and one.dim is not None]


def decide(
    found: Sequence[Family],
    held: Sequence[Held],
    mesh: Mesh,
    axes: Sequence[str],
    same: Same | None,
    sizes: Mapping[str, int],
) -> list[Tensor]:
    """How every family lies. Twice: replicas found first tell which lengths are those of whole dims."""
    ranks = {axis: mesh[axis] for axis in axes}
    seen: frozenset[int] = frozenset()
    tensors: list[Tensor] = []
    for _ in range(2):
        evidence = Evidence(ranks, frozenset(sizes.values()), seen, same)
        tensors = [_lying(family, held, axes, evidence) for family in found]
        seen = frozenset(n for tensor in tensors if tensor.shape and _is_whole(tensor) for n in tensor.shape if n > 1)
    _biases(tensors)
    return tensors


def _is_whole(tensor: Tensor) -> bool:
    """Whether each shard holds all of its tensor, as far as can be told: equal bytes, or the name of a norm."""
    kinds = [one for one in tensor.found if one.kind in ("cut", "unlike", "replica")]
    if any(one.kind != "replica" for one in kinds):
        return False
    return is_norm(tensor.family.words) or all(one.doubt is None for one in kinds)


def _lying(family: Family, held: Sequence[Held], axes: Sequence[str], evidence: Evidence) -> Tensor:
    found = [one for axis in axes if (one := along(family, axis, held, evidence)) is not None]
    if is_norm(family.words):
        found = [replace(one, doubt=None) if one.kind == "replica" else one for one in found]
    shapes = {held[number].shape for numbers in family.members.values() for number in numbers}
    uneven = any(one.kind == "cut" and one.dim is not None for one in found) and _one_cut(shapes, found)
    shape = next(iter(shapes)) if len(shapes) == 1 or uneven else None
    return Tensor(family, shape, None, found, [])


def _one_cut(shapes: set[Shape], found: Sequence[Along]) -> bool:
    """Whether shapes differ in dims that are cut only."""
    cut = {one.dim for one in found if one.kind == "cut"}
    bare = {tuple(n for d, n in enumerate(shape) if d not in cut) for shape in shapes}
    return len(bare) == 1


def _biases(tensors: Sequence[Tensor]) -> None:
    """A bias whose bytes tell nothing (all zeros, say) is cut as the rows of its weight are."""
    weights = {t.family.components[:-1]: t for t in tensors if t.family.components[-1] == "weight"}
    for tensor in tensors:
        weight = weights.get(tensor.family.components[:-1])
        if weight is None or tensor.family.components[-1] != "bias" or not weight.shape or not tensor.shape:
            continue
        for number, one in enumerate(tensor.found):
            if one.kind != "replica" or one.doubt is None or len(tensor.shape) != 1:
                continue
            other = next((w for w in weight.cuts if w.axis == one.axis), None)
            if other is not None and other.dim == 0 and weight.shape[0] == tensor.shape[0]:
                doubt = f"inferred: `{one.axis}` cuts biases as the rows of their weights"
                tensor.found[number] = Along(one.axis, "cut", 0, doubt=doubt)


def unsplit(tensor: Tensor, held: Sequence[Held]) -> None:
    """Pieces of several tensors in one are not joined: end to end they would be in the wrong order."""
    shapes = {held[number].shape for numbers in tensor.family.members.values() for number in numbers}
    if fused(tensor.family, tensor.known) is None or len(shapes) > 1:
        return
    for number, one in enumerate(tensor.found):
        if one.kind == "cut" and one.dim is not None:
            doubt = f"undecided: `{one.axis}` cuts all of it or part by part? Taken for replicas, which are compared"
            tensor.found[number] = Along(one.axis, "replica", doubt=doubt)


def whole(tensor: Tensor, held: Sequence[Held], ranks: Mapping[str, int]) -> Shape | None:
    """Shape of the logical tensor. Uneven pieces are added up along their axis."""
    if tensor.shape is None:
        return None
    numbers = next(iter(tensor.family.members.values()))
    shape = list(held[numbers[0]].shape)
    for one in tensor.cuts:
        assert one.dim is not None
        lengths = {held[n].coordinate[one.axis]: held[n].shape[one.dim] for n in numbers}
        even = len(set(lengths.values())) == 1
        shape[one.dim] = shape[one.dim] * ranks[one.axis] if even else sum(lengths.values())
    return tuple(shape)


def find_partial(tensors: Sequence[Tensor], held: Sequence[Held]) -> None:
    """Mark tensors that some layers (or experts …) have and others lack."""
    groups: dict[tuple[object, ...], dict[int, set[tuple[object, ...]]]] = {}
    for number, tensor in enumerate(tensors):
        for prefix, seen in _numbers(tensor, held):
            groups.setdefault(prefix, {}).setdefault(number, set()).update(seen)
    for members in groups.values():
        everything = set().union(*members.values())
        for number, seen in members.items():
            tensors[number].partial |= seen != everything


def _numbers(tensor: Tensor, held: Sequence[Held]) -> Iterator[tuple[tuple[object, ...], set[tuple[object, ...]]]]:
    """For each number in the name: the components up to there, and which values stand there, on which stages."""
    components = tensor.family.components
    counted = [one.axis for one in tensor.found if one.kind == "numbers"]
    places = [place for place, part in enumerate(components) if isinstance(part, Capture)]
    for last in places:
        seen: set[tuple[object, ...]] = set()
        for name, numbers in tensor.family.members.items():
            split = name.split(".")
            values = tuple(split[place] for place in places if place <= last)
            seen |= {(*values, *(held[n].coordinate.get(axis) for axis in counted)) for n in numbers}
        yield tuple(part if isinstance(part, str) else None for part in components[: last + 1]), seen
