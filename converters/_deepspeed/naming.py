"""Names of the parameters of an optimizer that only numbers them (ZeRO 0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ucp.errors import FitError
from ucp.layout import Shape
from ucp.plan import Extent
from ucp.store import Store
from ucp.tree import TensorLeaf, Tree

from . import nodes
from .infer import deal
from .rounding import is_rounded

_FLOATS = ("float", "bfloat", "complex")
_INFERRED = (
    "names of optimizer states were inferred from shapes, in the module's order of parameters: ZeRO 0 saves no names"
)
_FROM_VALUES = "; where shapes left a choice, the low-precision copies decided"
_HINT = "name the parameters that were not trained, for example frozen='adapter.*', or save with ZeRO 1"


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
            raise FitError(f"frozen: no parameter matches {pattern!r}")
    seen: set[Extent] = set()
    found: dict[str, TensorLeaf] = {}
    for name, node in entries.items():
        if not nodes.is_tensor(node) or name in buffers or node.extent in seen or not node.extent.size:
            continue
        seen.add(node.extent)
        if node.extent.dtype.startswith(_FLOATS) and not any(fnmatchcase(name, pattern) for pattern in frozen):
            found[name] = node
    return Candidates(found)


def names_of(
    store: Store,
    candidates: Candidates,
    groups: Sequence[Sequence[Member]],
    hints: Sequence[Sequence[Tree]],
    path: str,
) -> tuple[list[list[str]], list[str]]:
    """Names of all members by group, and remarks. `hints` are the groups' ``param_names`` where saved.

    FitError if no order-preserving assignment exists, or more than one.
    """
    if _hints_hold(candidates, groups, hints):
        return [[str(name) for name in names] for names in hints], []
    names = list(candidates.leaves)
    leaves = list(candidates.leaves.values())
    sizes = [len(group) for group in groups]
    note = _INFERRED

    def shapes_match(c: int, g: int, i: int) -> bool:
        return groups[g][i].may_be(leaves[c].extent.shape)

    dealt = deal(len(names), sizes, shapes_match)
    if dealt is not None and dealt.ways > 1 and any(member.master for group in groups for member in group):
        known: dict[tuple[int, int, int], bool] = {}

        def values_match(c: int, g: int, i: int) -> bool:
            master = groups[g][i].master
            if not shapes_match(c, g, i) or master is None:
                return False
            if (c, g, i) not in known:
                known[c, g, i] = is_rounded(store, master, leaves[c])
            return known[c, g, i]

        dealt = deal(len(names), sizes, values_match)
        note += _FROM_VALUES
    if dealt is None:
        raise FitError(
            f"{path}: the optimizer's {sum(sizes)} parameters are not in the order of the module's {len(names)}",
            hint="ZeRO 0 saves no names; give the optimizer named parameters, or save with ZeRO 1",
        )
    if dealt.ways > 1:
        left = [name for c, name in enumerate(names) if not any(c in group for group in dealt.groups)]
        raise FitError(
            f"{path}: shapes do not tell which {sum(sizes)} of the module's {len(names)} parameters the optimizer owns "
            f"and in which group; leaving out {' '.join(left[:6]) or 'none'} is one way",
            hint=_HINT,
        )
    return [[names[c] for c in group] for group in dealt.groups], [note]


def flat_names(store: Store, candidates: Candidates, masters: Sequence[TensorLeaf], path: str) -> list[list[str]]:
    """Names of each flat group in flat order: the module's parameters are views of flat 16-bit tensors of that order.

    FitError if the module does not show which these are.
    """
    runs = _runs(candidates)
    found: list[list[str]] = []
    for g, master in enumerate(masters):
        fitting = [
            run
            for run in runs
            if sum(candidates.leaves[name].extent.size for name in run) == master.extent.size
            and is_rounded(store, master, _joined([candidates.leaves[name] for name in run]))
        ]
        if len(fitting) != 1:
            raise FitError(
                f"{path}: the module does not show which parameters lie in flat group {g} of {master.extent.size} "
                f"elements ({len(fitting)} possibilities)",
                hint=_HINT,
            )
        found.append(fitting[0])
    if len({name for names in found for name in names}) != sum(map(len, found)):
        raise FitError(f"{path}: two flat groups look alike", hint=_HINT)
    return found


def _hints_hold(candidates: Candidates, groups: Sequence[Sequence[Member]], hints: Sequence[Sequence[Tree]]) -> bool:
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


def _runs(candidates: Candidates) -> list[list[str]]:
    """Names whose tensors lie back to back in the file, each run one flat storage."""
    ordered = sorted(candidates.leaves, key=lambda name: candidates.leaves[name].extent.offset)
    runs: list[list[str]] = []
    for name in ordered:
        extent = candidates.leaves[name].extent
        before = candidates.leaves[runs[-1][-1]].extent if runs else None
        if before is not None and extent.is_contiguous and before.span[1] == extent.offset:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _joined(leaves: Sequence[TensorLeaf]) -> TensorLeaf:
    first = leaves[0].extent
    size = sum(leaf.extent.size for leaf in leaves)
    return TensorLeaf(Extent.contiguous(first.object, first.offset, (size,), first.dtype))
