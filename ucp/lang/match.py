"""Matching tensor names against patterns, and making names from them.

A number is written without leading zeros. Names are matched whole. Names that differ in their numbers only are looked
up once, so that the cost per name is one regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ucp.errors import FitError
from ucp.lang.ast import Capture, Computed, Pattern, Wild

Values = Mapping[str, int | str]
"""Captured values by name: numbers where the capture is one, else a dotted component."""

_NUMBER = "(?:0|[1-9][0-9]{0,17})"
"""As many digits as the language's numbers have."""
_COMPUTED = "__computed_"
_DIGITS = re.compile("[0-9]+")


@dataclass(frozen=True, slots=True)
class Matcher:
    """A compiled pattern. `numbers` are the captures that are numbers, `offsets` what is added to them in names."""

    pattern: Pattern
    numbers: frozenset[str]
    offsets: Mapping[str, int]
    regex: re.Pattern[str]
    skeleton: re.Pattern[str]

    @classmethod
    def of(cls, pattern: Pattern, numbers: Collection[str] = (), offsets: Mapping[str, int] | None = None) -> Matcher:
        """Compile `pattern`. A capture beside other text in its component is a number, in `numbers` or not."""
        found = frozenset(numbers) | in_part_of_component(pattern)
        whole, bare = _regex(pattern, found), _regex(pattern, found, bare=True)
        return cls(pattern, found, offsets or {}, re.compile(whole, re.DOTALL), re.compile(bare, re.DOTALL))

    def match(self, name: str) -> dict[str, int | str] | None:
        """The captured values if `name` matches whole, else None. Offsets are taken off.

        The number at the k-th computed place of the pattern is under ``"=k"``; it is for the caller to check.
        """
        found = self.regex.fullmatch(name)
        if found is None:
            return None
        values: dict[str, int | str] = {}
        for key, text in found.groupdict().items():
            if key.startswith(_COMPUTED):
                values["=" + key.removeprefix(_COMPUTED)] = int(text)
            else:
                values[key] = int(text) - self.offsets.get(key, 0) if key in self.numbers else text
        return None if any(isinstance(value, int) and value < 0 for value in values.values()) else values


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


def computed(pattern: Pattern) -> tuple[Computed, ...]:
    """The computed numbers of a pattern in order."""
    return tuple(part for part in pattern.parts if isinstance(part, Computed))


def spell(pattern: Pattern, values: Values, offsets: Mapping[str, int] | None = None) -> str:
    """The name that `pattern` makes with `values`, keyed as `Matcher.match` gives them.

    FitError for a number below zero.
    """
    text, places = "", 0
    for part in pattern.parts:
        if isinstance(part, str):
            text += part
        elif isinstance(part, Computed):
            text += _shown(pattern, values[f"={places}"])
            places += 1
        else:
            assert isinstance(part, Capture), "a name with ** cannot be spelled"
            value = values[part.name]
            text += _shown(pattern, value + (offsets or {}).get(part.name, 0) if isinstance(value, int) else value)
    return text


def _shown(pattern: Pattern, value: int | str) -> str:
    if isinstance(value, int) and value < 0:
        raise FitError(f"{describe(pattern)}: a number in the name comes out as {value}")
    return str(value)


def describe(pattern: Pattern) -> str:
    """The pattern as text without cuts, for messages."""
    shown = {Wild: "**", Computed: "{=}"}
    return "".join(
        part if isinstance(part, str) else f"{{{part.name}}}" if isinstance(part, Capture) else shown[type(part)]
        for part in pattern.parts
    )


def nearest(name: str, patterns: Sequence[Pattern]) -> Pattern | None:
    """The pattern that looks most like `name`, if any does."""
    from difflib import get_close_matches

    shown = {"".join(part if isinstance(part, str) else "#" for part in pattern.parts): pattern for pattern in patterns}
    close = get_close_matches(_DIGITS.sub("#", name), shown, n=1, cutoff=0.5)
    return shown[close[0]] if close else None


def _regex(pattern: Pattern, numbers: frozenset[str], *, bare: bool = False) -> str:
    """A regular expression; with `bare`, one for names whose numbers are all ``#``."""
    text, places = "", 0
    seen: set[str] = set()
    passed: list[str] = []
    for part in pattern.parts:
        if isinstance(part, str):
            text += re.escape(_DIGITS.sub("#", part) if bare else part)
        elif isinstance(part, Wild):
            passed, text = [*passed, text], ""
        elif isinstance(part, Computed):
            text += "#" if bare else f"(?P<{_COMPUTED}{places}>{_NUMBER})"
            places += 1
        elif bare:
            text += "#" if part.name in numbers else "[^.]+"
        else:
            inner = _NUMBER if part.name in numbers else "[^.]+"
            text += f"(?P={part.name})" if part.name in seen else f"(?P<{part.name}>{inner})"
            seen.add(part.name)
    # What stands between two wild parts is taken where it is first met: later places gain nothing, and cost much.
    inner = "".join(f"(?>.*?{between})" for between in passed[1:])
    found = f"{passed[0]}{inner}.*{text}" if passed else text
    return re.sub(r"(?:\\?#)+", "#+", found) if bare else found
