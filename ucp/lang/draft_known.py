"""What programs that exist already say of names: the logical name of a tensor, or that it is fused or transposed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ucp.lang.ast import Capture, Computed, Pattern, Program
from ucp.lang.check import Ready, check
from ucp.lang.draft_names import Family
from ucp.lang.match import Matcher, captures, computed, describe
from ucp.layout.branches import branches
from ucp.layout.expr import Layout
from ucp.layout.spell import spell

_MOST_NAMES = 3


@dataclass(frozen=True, slots=True)
class Known:
    """What a rule of `program` at `line` says of a family.

    `target` is the logical name with the family's own captures; `order` is, for each dim of the logical tensor, the dim
    of the source tensor that it is, or the name of a capture that is stacked. Both are None where the rule splits the
    tensor. `text` spells the rule.
    """

    program: str
    line: int | None
    target: Pattern | None
    order: tuple[int | str, ...] | None
    text: str

    @property
    def where(self) -> str:
        """For people."""
        return self.program if self.line is None else f"{self.program}:{self.line}"

    @property
    def plain(self) -> bool:
        """Whether the logical tensor is the source tensor, apart from captures that are stacked in front."""
        kept = [dim for dim in self.order or () if isinstance(dim, int)]
        return self.target is not None and kept == sorted(kept)


def recognise(found: Sequence[Family], ranks: Sequence[int], programs: Sequence[Program]) -> list[list[Known]]:
    """For each family, of tensors of so many dims, what `programs` say of it; the one that knows most is first."""
    known: list[list[Known]] = [[] for _ in found]
    counts: dict[str, int] = {}
    for program in programs:
        for ready in check(program).rules:
            matcher = Matcher.of(ready.equation.source, ready.numbers)
            for number, family in enumerate(found):
                one = _known(program, ready, matcher, family, ranks[number])
                if one is not None:
                    known[number].append(one)
                    counts[one.program] = counts.get(one.program, 0) + 1
    return [sorted(rules, key=lambda one: -counts[one.program]) for rules in known]


def _known(program: Program, ready: Ready, matcher: Matcher, family: Family, rank: int) -> Known | None:
    equation = ready.equation
    names = list(family.members)[:_MOST_NAMES]
    values = [matcher.match(name) for name in names]
    if ready.layout is None or len(ready.layout.dims) != rank or any(found is None for found in values):
        return None
    if computed(equation.source) or any(capture.offset for capture in captures(equation.source)):
        return None
    own = [Matcher.of(family.pattern, {c.name for c in family.captures}).match(name) or {} for name in names]
    renamed: dict[str, str] = {}
    for capture in captures(equation.source):
        pairs = list(zip(own, values, strict=True))
        same = [c.name for c in family.captures if all(_equal(o[c.name], v, capture.name) for o, v in pairs)]
        if not same:
            return None
        renamed[capture.name] = same[0]
    line = equation.at[0] if equation.at else None
    stem = program.file.removesuffix(".ucp")
    if len(equation.targets) > 1 or ready.targets is None:
        return Known(stem, line, None, None, _spelled(ready))
    order = _order(ready.layout, ready.targets[0], renamed)
    target = _renamed(equation.targets[0].name, renamed)
    if order is None or target is None:
        return Known(stem, line, None, None, _spelled(ready))
    return Known(stem, line, target, order, _spelled(ready))


def _equal(mine: int | str, found: dict[str, int | str] | None, capture: str) -> bool:
    return found is not None and str(found[capture]) == str(mine)


def _order(source: Layout, target: Layout, renamed: dict[str, str]) -> tuple[int | str, ...] | None:
    """Which dim of the source each dim of the target is; None where dims are split or joined."""
    here = list(_names(source))
    found: list[int | str] = []
    for names in _names(target):
        if names in here:
            found.append(here.index(names))
        elif len(names) == 1 and names[0] in renamed:
            found.append(renamed[names[0]])
        else:
            return None
    return tuple(found) if sorted(d for d in found if isinstance(d, int)) == list(range(len(here))) else None


def _names(layout: Layout) -> Iterator[tuple[str, ...]]:
    for dim in branches(layout)[0].dims:
        yield tuple(leaf.name for leaf in dim)


def _renamed(pattern: Pattern, renamed: dict[str, str]) -> Pattern | None:
    parts: list[str | Capture] = []
    for part in pattern.parts:
        if isinstance(part, Capture):
            if part.name not in renamed:
                return None
            parts.append(Capture(renamed[part.name]))
        elif isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Computed):
            return None
    return Pattern(tuple(parts))


def _spelled(ready: Ready) -> str:
    def layout(of: Layout | None) -> str:
        return "" if of is None else f" [{', '.join(spell(dim) for dim in of.dims)}]"

    right = (f"{describe(side.name)}{layout(side.layout)}" for side in ready.equation.targets)
    return f"{layout(ready.layout).strip()} <-> {', '.join(right)}"
