"""Names of a checkpoint as patterns: what differs in a number only is one family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod

from ucp.lang.ast import Capture, Computed, Pattern, Wild
from ucp.lang.match import Matcher
from ucp.lang.overlap import both_match
from ucp.layout.expr import Cut

LAYER, EXPERT = "l", "e"
_LAYERS = frozenset({"layers", "layer", "h", "blocks", "block", "resblocks"})
_EXPERTS = frozenset({"experts", "local_experts", "expert"})

Part = str | Capture | Computed | Wild


@dataclass(frozen=True, slots=True)
class Family:
    """Tensors whose names differ in numbers only.

    `components` are the dotted parts of the name, a `Capture` where a number stands. `members` maps each name to the
    numbers of the shards that have it.
    """

    components: tuple[str | Capture, ...]
    members: Mapping[str, tuple[int, ...]]

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The numbers in the name."""
        return tuple(part for part in self.components if isinstance(part, Capture))

    @property
    def pattern(self) -> Pattern:
        """The name as a program writes it."""
        return dotted(self.components)

    @property
    def words(self) -> str:
        """The name without its numbers, for looking at words."""
        return ".".join(part for part in self.components if isinstance(part, str))


def families(names: Sequence[str]) -> list[Family]:
    """Shards by families, in order of first appearance; ``names[i]`` is the name of shard i.

    A component that is a number becomes a capture if tensors differ in it, or if the component before it names layers
    or experts; other numbers stay as they are.
    """
    groups: dict[tuple[str | None, ...], dict[str, list[int]]] = {}
    for number, name in enumerate(names):
        skeleton = tuple(None if _is_number(part) else part for part in name.split("."))
        groups.setdefault(skeleton, {}).setdefault(name, []).append(number)
    named: dict[tuple[str | None, ...], str] = {}
    found = [Family(_components(group, named), {n: tuple(h) for n, h in group.items()}) for group in groups.values()]
    return _apart(found)


def dotted(components: Iterable[str | Capture]) -> Pattern:
    """Components joined with dots."""
    parts: list[Part] = []
    for number, part in enumerate(components):
        for piece in [".", part] if number else [part]:
            if isinstance(piece, str) and parts and isinstance(parts[-1], str):
                parts[-1] += piece
            else:
                parts.append(piece)
    return Pattern(tuple(parts))


def with_cut(family: Family, name: str, axis: str) -> tuple[str | Capture, ...]:
    """The components with the capture `name` counted over `axis`: ``{l/pp}``."""
    return tuple(
        Capture(name, (*part.cuts, Cut(axis))) if isinstance(part, Capture) and part.name == name else part
        for part in family.components
    )


def _components(group: Iterable[str], named: dict[tuple[str | None, ...], str]) -> tuple[str | Capture, ...]:
    """`named` are the captures of all families, by what stands before them: each place has a number of its own."""
    split = [name.split(".") for name in group]
    found: list[str | Capture] = []
    for place, column in enumerate(zip(*split, strict=True)):
        part = column[0]
        before = split[0][place - 1] if place else ""
        listed = before in _LAYERS or before in _EXPERTS
        if _is_number(part) and (listed or len(set(column)) > 1):
            prefix = tuple(part if isinstance(part, str) else None for part in found)
            found.append(Capture(named.setdefault(prefix, _capture_name(before, set(named.values())))))
        else:
            found.append(part)
    return tuple(found)


def _capture_name(before: str, taken: set[str]) -> str:
    base = EXPERT if before in _EXPERTS else LAYER if before in _LAYERS or not before else "i"
    names = (base + (str(n) if n > 1 else "") for n in count(1))
    return next(name for name in names if name not in taken)


def _is_number(text: str) -> bool:
    """Whether a component is a number that comes back as it was: no leading zeros."""
    return text.isascii() and text.isdecimal() and text == str(int(text))


def _apart(found: list[Family]) -> list[Family]:
    """Families whose patterns no name can match twice: where one could, the members of both are named one by one."""
    matchers = [Matcher.of(family.pattern) for family in found]
    clashing: set[int] = set()
    for b in range(len(found)):
        for a in range(b):
            if both_match(matchers[a], matchers[b]) is not None:
                clashing |= {a, b}
    return [one for number, family in enumerate(found) for one in (_each(family) if number in clashing else [family])]


def _each(family: Family) -> list[Family]:
    return [Family(tuple(name.split(".")), {name: held}) for name, held in family.members.items()]


def complete(family: Family) -> bool:
    """Whether the numbers in the names are all from zero to the largest, in every combination."""
    places = [place for place, part in enumerate(family.components) if isinstance(part, Capture)]
    seen = {tuple(int(name.split(".")[place]) for place in places) for name in family.members}
    wanted: int = prod(1 + max(column) for column in zip(*seen, strict=True))
    return len(seen) == wanted
