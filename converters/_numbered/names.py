"""Names of the parameters of an optimizer that only numbers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from ucp.errors import FitError
from ucp.layout import Shape
from ucp.plan import Extent
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from .._deepspeed import nodes
from .infer import Choices, Matches, deal
from .rounding import is_rounded

_FLOATS = ("float", "bfloat", "complex")
_FROM_VALUES = "; where shapes left a choice, the low-precision copies decided"


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of names that were inferred (`inferred`), and what would settle those that cannot be (`remedy`).

    `kept` is where states without a name are carried.
    """

    inferred: str
    remedy: str
    kept: str = "state['optimizer']['unnamed']"


@dataclass(frozen=True, slots=True)
class Candidates:
    """The module's tensors that an optimizer may own, in the module's order."""

    leaves: dict[str, TensorLeaf]


@dataclass(frozen=True, slots=True)
class Member:
    """One numbered parameter: its states, and its fp32 master where there is one."""

    state: Mapping[str, Tree]
    master: TensorLeaf | None

    def may_be(self, shape: Shape) -> bool:
        """Whether a parameter of `shape` can have this master or these states; always if there are none."""
        if self.master is not None:
            return self.master.extent.shape == shape
        tensors = {key: v.extent.shape for key, v in self.state.items() if nodes.is_tensor(v) and v.extent.shape}
        if not tensors:
            return True
        if any("row" in key for key in tensors) and any("col" in key for key in tensors):
            return len(shape) > 1 and set(tensors.values()) <= {shape, *_factors(shape)}
        return shape in tensors.values()


def candidates_of(entries: Mapping[str, Tree], buffers: set[str], frozen: Sequence[str]) -> Candidates:
    """Tensors of the module that are no buffers, no second name of an earlier one, and match no pattern of `frozen`.

    FitError for a pattern that matches nothing.
    """
    for pattern in frozen:
        if not any(fnmatchcase(name, pattern) for name in entries):
            raise FitError(f"frozen: no parameter matches {pattern!r}", hint="`ucp ls` shows the names")
    seen: set[Extent] = set()
    found: dict[str, TensorLeaf] = {}
    for name, node in entries.items():
        if not nodes.is_tensor(node) or name in buffers or node.extent in seen or not node.extent.size:
            continue
        seen.add(node.extent)
        if node.extent.dtype.startswith(_FLOATS) and not any(fnmatchcase(name, pattern) for pattern in frozen):
            found[name] = node
    return Candidates(found)


@dataclass(frozen=True, slots=True)
class Names:
    """Names of numbered members.

    `certain` has, for each member of each group, its name, or None where there is doubt. `open` has the candidates that
    may be one of those members or none, each with what would settle it.
    """

    certain: list[list[str | None]]
    open: dict[str, str]
    notes: list[str]


def names_of(
    store: Store,
    candidates: Candidates,
    groups: Sequence[Sequence[Member]],
    hints: Sequence[Sequence[Tree]],
    path: str,
    *,
    words: Words,
) -> Names:
    """The names of all members by group: what all order-preserving assignments that fit have in common.

    `hints` are the groups' ``param_names`` where saved, which are believed if they fit.
    """
    if hints_hold(candidates, groups, hints):
        return Names([[str(name) for name in names] for names in hints], {}, [])
    names, note = list(candidates.leaves), words.inferred
    sizes = [len(group) for group in groups]
    shapes_match = _by_shape(candidates, groups)
    dealt = deal(len(names), sizes, shapes_match)
    if dealt is None:
        why = f"the optimizer's {sum(sizes)} parameters are not in the module's order"
        return unnamed(names, sizes, path, why, words=words)
    if _ambiguous(dealt) and any(member.master for group in groups for member in group):
        by_value = deal(len(names), sizes, _by_value(store, candidates, groups, shapes_match))
        dealt, note = (by_value, note + _FROM_VALUES) if by_value is not None else (dealt, note)
    return settled(names, dealt, path, note, "shapes do not tell which of them it owns", words=words)


def names_without_order(
    candidates: Candidates,
    groups: Sequence[Sequence[Member]],
    hints: Sequence[Sequence[Tree]],
    path: str,
    *,
    words: Words,
) -> Names:
    """As `names_of` where the order of the module is not known: a name is certain if no other has a shape that fits."""
    if hints_hold(candidates, groups, hints):
        return Names([[str(name) for name in names] for names in hints], {}, [])
    names, fits = list(candidates.leaves), _by_shape(candidates, groups)
    dealt = tuple(
        tuple(tuple(c for c in range(len(names)) if fits(c, g, i)) for i in range(len(group)))
        for g, group in enumerate(groups)
    )
    alone = [possible[0] for group in dealt for possible in group if len(possible) == 1]
    if len(set(alone)) < len(alone) or any(not possible for group in dealt for possible in group):
        sizes = [len(group) for group in groups]
        return unnamed(names, sizes, path, "the optimizer's parameters do not have the module's shapes", words=words)
    why = "the file with the weights does not keep the order of parameters, and shapes do not tell which is which"
    return settled(names, dealt, path, words.inferred, why, words=words)


def settled(names: Sequence[str], dealt: Choices, path: str, note: str, why: str, *, words: Words) -> Names:
    """What is certain where each member can be any of the candidates in `dealt`."""
    certain = [[names[possible[0]] if len(possible) == 1 else None for possible in group] for group in dealt]
    taken = {name for group in certain for name in group}
    doubtful = {c for group in dealt for possible in group if len(possible) > 1 for c in possible}
    doubtful = {c for c in doubtful if names[c] not in taken}
    notes = [note] if taken - {None} else []
    if not any(name is None for group in certain for name in group):
        return Names(certain, {}, notes)
    left, remarks = undecided([names[c] for c in sorted(doubtful)], path, why, words=words)
    return Names(certain, left, [*notes, *remarks])


def unnamed(names: Sequence[str], sizes: Sequence[int], path: str, why: str, *, words: Words) -> Names:
    """Nothing is certain of groups of `sizes`."""
    return Names([[None] * size for size in sizes], *undecided(names, path, why, words=words))


def undecided(names: Sequence[str], path: str, why: str, *, words: Words) -> tuple[dict[str, str], list[str]]:
    """For names of which the optimizer's part is not known: what would settle each, and a remark."""
    remark = (
        f"{path}: the optimizer states of {' '.join(names[:8])}{' …' if len(names) > 8 else ''} "
        f"({len(names)} of the module's parameters) cannot be told apart: {why}. They are carried as they are, in "
        f"{words.kept}. To settle it, {words.remedy}"
    )
    return dict.fromkeys(names, words.remedy), [remark]


def _ambiguous(dealt: Choices) -> bool:
    return any(len(possible) > 1 for group in dealt for possible in group)


def _by_shape(candidates: Candidates, groups: Sequence[Sequence[Member]]) -> Matches:
    shapes = [leaf.extent.shape for leaf in candidates.leaves.values()]

    @cache
    def fits(shape: Shape, g: int, i: int) -> bool:
        return groups[g][i].may_be(shape)

    return lambda c, g, i: fits(shapes[c], g, i)


def _by_value(
    store: Store, candidates: Candidates, groups: Sequence[Sequence[Member]], shapes_match: Matches
) -> Matches:
    leaves = list(candidates.leaves.values())

    @cache
    def fits(c: int, g: int, i: int) -> bool:
        master = groups[g][i].master
        return master is not None and shapes_match(c, g, i) and is_rounded(store, master, leaves[c])

    return fits


def hints_hold(candidates: Candidates, groups: Sequence[Sequence[Member]], hints: Sequence[Sequence[Tree]]) -> bool:
    """Whether saved names are names of this module, one per member, with shapes that fit."""
    names = [name for group in hints for name in group]
    if [len(group) for group in hints] != [len(group) for group in groups] or len(set(names)) != len(names):
        return False
    return all(
        name in candidates.leaves and member.may_be(candidates.leaves[name].extent.shape)
        for group, members in zip(hints, groups, strict=True)
        for name, member in zip(group, members, strict=True)
    )


def _factors(shape: Shape) -> set[Shape]:
    """Shapes of row and column factors: torch/optim/_adafactor.py keeps dims of one, transformers drops them."""
    row, column = shape[:-1], (*shape[:-2], shape[-1])
    return {row, column, (*row, 1), (*shape[:-2], 1, shape[-1])}
