"""Matching tensor names against patterns, and making names from them.

A number is written without leading zeros. Names are matched whole. Names that differ in their numbers only are looked
up once, so that the cost per name is one regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ucp.lang.ast import Capture, Pattern, Wild

Values = Mapping[str, int | str]
"""Captured values by name: numbers where the capture is one, else a dotted component."""

_NUMBER = "(?:0|[1-9][0-9]*)"
_DIGITS = re.compile("[0-9]+")


@dataclass(frozen=True, slots=True)
class Matcher:
    """A compiled pattern. `numbers` are the captures that stand for numbers."""

    pattern: Pattern
    numbers: frozenset[str]
    regex: re.Pattern[str]
    skeleton: re.Pattern[str]

    @classmethod
    def of(cls, pattern: Pattern, numbers: Collection[str] = ()) -> Matcher:
        """Compile `pattern`. A capture beside other text in its component is a number even if it is not in `numbers`."""
        found = frozenset(numbers) | in_part_of_component(pattern)
        return cls(
            pattern, found, re.compile(_regex(pattern, found, _NUMBER)), re.compile(_regex(pattern, found, "#", bare=True))
        )

    def match(self, name: str) -> dict[str, int | str] | None:
        """The captured values if `name` matches whole, else None."""
        found = self.regex.fullmatch(name)
        if found is None:
            return None
        return {key: int(text) if key in self.numbers else text for key, text in found.groupdict().items()}


class Index:
    """Many matchers, to find those that match a name."""

    def __init__(self, matchers: Iterable[Matcher]) -> None:
        self._matchers = tuple(matchers)
        self._near: dict[str, tuple[int, ...]] = {}

    def find(self, name: str) -> list[tuple[int, dict[str, int | str]]]:
        """Number and captured values of every matcher that matches `name`."""
        skeleton = _DIGITS.sub("#", name)
        near = self._near.get(skeleton)
        if near is None:
            near = tuple(i for i, matcher in enumerate(self._matchers) if matcher.skeleton.fullmatch(skeleton))
            self._near[skeleton] = near
        found = ((i, self._matchers[i].match(name)) for i in near)
        return [(i, values) for i, values in found if values is not None]


def in_part_of_component(pattern: Pattern) -> frozenset[str]:
    """Captures that share a dotted component with other text or another capture."""
    shared = set()
    for i, part in enumerate(pattern.parts):
        if not isinstance(part, Capture):
            continue
        before = pattern.parts[i - 1] if i else "."
        after = pattern.parts[i + 1] if i + 1 < len(pattern.parts) else "."
        if not (isinstance(before, str) and before.endswith(".") and isinstance(after, str) and after.startswith(".")):
            shared.add(part.name)
    return frozenset(shared)


def captures(pattern: Pattern) -> tuple[Capture, ...]:
    """The captures of a pattern in order."""
    return tuple(part for part in pattern.parts if isinstance(part, Capture))


def spell(pattern: Pattern, values: Values) -> str:
    """The name that `pattern` makes with `values` for its captures."""
    return "".join(part if isinstance(part, str) else str(values[_capture(part).name]) for part in pattern.parts)


def describe(pattern: Pattern) -> str:
    """The pattern as text without cuts, for messages."""
    shown = (part if isinstance(part, str) else "**" if isinstance(part, Wild) else f"{{{part.name}}}" for part in pattern.parts)
    return "".join(shown)


def nearest(name: str, patterns: Sequence[Pattern]) -> Pattern | None:
    """The pattern whose text looks most like `name`, if any does."""
    from difflib import get_close_matches

    shown = {_DIGITS.sub("#", describe_plain(pattern)): pattern for pattern in patterns}
    close = get_close_matches(_DIGITS.sub("#", name), shown, n=1, cutoff=0.5)
    return shown[close[0]] if close else None


def describe_plain(pattern: Pattern) -> str:
    """The pattern with 0 for every capture: what a name of it looks like."""
    return "".join(part if isinstance(part, str) else "0" for part in pattern.parts)


def _capture(part: Capture | Wild) -> Capture:
    assert isinstance(part, Capture), "a name with ** cannot be spelled"
    return part


def _regex(pattern: Pattern, numbers: frozenset[str], number: str, *, bare: bool = False) -> str:
    """A regular expression; with `bare`, one for names whose numbers are all ``#`` and which may be captured."""
    text, seen = "", set()
    for part in pattern.parts:
        if isinstance(part, str):
            text += re.escape(_DIGITS.sub("#", part) if bare else part)
        elif isinstance(part, Wild):
            text += ".*"
        elif bare:
            text += number if part.name in numbers else "[^.]+"
        elif part.name in seen:
            text += f"(?P={part.name})"
        else:
            text += f"(?P<{part.name}>{number if part.name in numbers else '[^.]+'})"
        seen.add(getattr(part, "name", ""))
    return text
