"""That layers which have some of their tensors have all of them, and that there are as many layers as said.

A rule with a captured number stands for one tensor per number, and which numbers there are only the other rules tell:
`layers.{l}.mlp.up.weight` without layer 7 is a hole if `layers.7.attn.q.weight` is there. Rules that may find nothing
are left out, except that those of one optional block find something together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from ucp.errors import FitError
from ucp.lang.ast import Capture, Pattern
from ucp.lang.check import Checked, Ready
from ucp.lang.choose import holds
from ucp.lang.match import Matcher, captures, computed, describe, spell

Numbers = tuple[int | str, ...]
"""Values of the captures of a name, in order."""


@dataclass(frozen=True, slots=True)
class _Member:
    """One target of a rule, and the names it made by the captured values up to some capture."""

    ready: Ready
    target: Pattern
    depth: int
    """How many captures of the name the values are of."""
    names: Mapping[Numbers, str]


def check_siblings(
    checked: Checked, flags: Mapping[str, bool], produced: Mapping[int, Collection[str]], sizes: Mapping[str, int]
) -> None:
    """FitError for a number that some rules of a group have and another lacks.

    `produced` are the logical names that each rule made, by its number; `flags` include the axes of the mesh. A capture
    that is one of the `sizes` counts from 0 to there.
    """
    groups: dict[str, list[_Member]] = {}
    for ready in checked.rules:
        if ready.equation.imports and holds(ready.equation.conditions, flags):
            _stacks(checked, ready, produced.get(ready.equation.number, ()), sizes)
            for prefix, member in _members(ready, produced.get(ready.equation.number, ())):
                groups.setdefault(prefix, []).append(member)
    for members in groups.values():
        _counted(checked, members, sizes)
        _alike(checked, [m for m in members if not m.ready.equation.optional], members)
        choices = {m.ready.equation.choice for m in members} - {None}
        for choice in choices:
            together = [m for m in members if m.ready.equation.choice == choice]
            _alike(checked, together, together)


def _members(ready: Ready, produced: Collection[str]) -> Iterator[tuple[str, _Member]]:
    """For each target and each of its captures: the name up to there, and who has which values."""
    for side in ready.equation.targets:
        order = [capture.name for capture in captures(side.name)]
        if not order:
            continue
        matcher = Matcher.of(side.name, ready.numbers | ready.axis_leaves)
        found = [(name, values) for name in produced if (values := matcher.match(name)) is not None]
        for n, prefix in enumerate(_prefixes(side.name), 1):
            names = {tuple(values[key] for key in order[:n]): name for name, values in found}
            yield prefix, _Member(ready, side.name, n, names)


def _prefixes(pattern: Pattern) -> Iterator[str]:
    for n, part in enumerate(pattern.parts, 1):
        if isinstance(part, Capture):
            yield describe(Pattern(pattern.parts[:n]))


def _counted(checked: Checked, members: list[_Member], sizes: Mapping[str, int]) -> None:
    """If the last capture of the members' prefix is a size: all numbers below it are there, and no other.

    So it is for every value of the captures before it that anyone has.
    """
    depth = members[0].depth
    capture = captures(members[0].target)[depth - 1].name
    seen: dict[Numbers, dict[str, str]] = {}
    for member in members:
        for values, name in member.names.items():
            seen.setdefault(values[:-1], {})[str(values[-1])] = name
    if depth == 1 and any(not member.ready.equation.optional for member in members):
        seen.setdefault((), {})
    if capture not in sizes:
        return
    for before, names in seen.items():
        extra = [name for value, name in names.items() if not _counts(value, sizes[capture])]
        # The first gap is at most as far as there are names, whatever a configuration says.
        gap = next((n for n in range(sizes[capture]) if str(n) not in names), None)
        if extra or gap is not None:
            problem = f"{extra[0]} is there" if extra else f"there is none of {_name(members[0], (*before, str(gap)))}"
            raise FitError(
                f"{checked.program.file}: {capture} is {sizes[capture]}, but {problem}",
                hint="tensors of whole layers are missing, or the configuration is of another model",
            )


def _counts(value: str, size: int) -> bool:
    return value.isdecimal() and str(int(value)) == value and int(value) < size


def _stacks(checked: Checked, ready: Ready, produced: Collection[str], sizes: Mapping[str, int]) -> None:
    """Tensors that lie stacked along a dim of the source: each index of the dim made one."""
    for side, named in zip(ready.equation.targets, ready.named, strict=False):
        stacked = sorted(named - ready.leaves)
        if not stacked:
            continue
        matcher = Matcher.of(side.name, ready.numbers | ready.axis_leaves | named)
        found: dict[Numbers, set[Numbers]] = {}
        for name in produced:
            values = matcher.match(name)
            if values is not None:
                rest = tuple(value for key, value in values.items() if key not in stacked)
                found.setdefault(rest, set()).add(tuple(values[key] for key in stacked))
        for indices in found.values():
            if len(indices) < prod(sizes[name] for name in stacked):
                raise FitError(
                    f"{checked.where(ready.equation)}: {describe(side.name)} is there {len(indices)} times, but "
                    f"{' and '.join(f'{name} is {sizes[name]}' for name in stacked)}",
                    hint="a rank's tensors are missing",
                )


def _alike(checked: Checked, members: list[_Member], others: list[_Member]) -> None:
    """Each of `members` has every value that any of `others` has."""
    everything = {values: name for member in others for values, name in member.names.items()}
    for member in members:
        missing = sorted(everything.keys() - member.names.keys(), key=str)
        if missing:
            raise FitError(
                f"{_name(member, missing[0])} is missing, but {everything[missing[0]]} is there; "
                f"its rule is {checked.where(member.ready.equation)}, for {describe(member.ready.equation.source)}",
                hint="if it is so by design, the rule, or the block of rules that come together, is `optional`",
            )


def _name(member: _Member, values: Numbers) -> str:
    names = [capture.name for capture in captures(member.target)]
    unknown = {**{name: f"{{{name}}}" for name in names}, **{f"={k}": "?" for k in range(len(computed(member.target)))}}
    return spell(member.target, {**unknown, **dict(zip(names, values, strict=False))})
