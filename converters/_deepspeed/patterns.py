"""Matches the regular expressions of a foreign file, in bounded time whatever they are.

``universal_checkpoint_info`` names parameters by Python regexes that DeepSpeed gives to ``re.match``
(deepspeed/checkpoint/ds_to_universal.py). An untrusted one may keep Python's engine busy for ever. Here a pattern is
followed by sets of positions, so nothing is ever tried twice, and the work that one pattern may cost is limited. What
such lists hold is known: text, ``.``, classes, groups, ``|`` and repetition; the rest is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ucp.errors import FitError

_MOST_CHARACTERS = 4096
_MOST_DEPTH = 50
_MOST_WORK = 1_000_000
_MOST_LIST_WORK = 20_000_000
"""What all patterns of a list may cost over all names: some ten patterns of some ten thousand names cost a half."""

_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_PLAIN = re.compile(r"\^?((?:[^\\.^$*+?{}\[\]|()]|\\[^0-9A-Za-z])*)\$")
"""A name written out: what AutoTP writes, ``^`` + ``re.escape(name)`` + ``$``."""


@dataclass(frozen=True, slots=True)
class _One:
    """One character for which `fits` holds, and not if `negated`."""

    fits: tuple[Callable[[str], bool], ...]
    negated: bool = False

    def takes(self, character: str) -> bool:
        return any(fits(character) for fits in self.fits) != self.negated


@dataclass(frozen=True, slots=True)
class _Anchor:
    r"""``^ $ \A \Z \b \B``."""

    kind: str

    def holds(self, text: str, at: int) -> bool:
        if self.kind in "^A":
            return at == 0
        if self.kind == "$":
            return at == len(text) or (at == len(text) - 1 and text[at] == "\n")
        if self.kind == "Z":
            return at == len(text)
        word = _CLASSES["w"]
        edge = (at > 0 and word(text[at - 1])) != (at < len(text) and word(text[at]))
        return edge == (self.kind == "b")


@dataclass(frozen=True, slots=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    branches: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    item: _Node
    least: int
    most: int | None


_Node = _One | _Anchor | _Sequence | _Choice | _Repeat


@dataclass(slots=True)
class _Matcher:
    """Follows a pattern through one text; FitError where that takes too much work."""

    pattern: str
    text: str
    left: int = _MOST_WORK

    def ends(self, node: _Node, starts: frozenset[int]) -> frozenset[int]:
        """Where `node` can end if it begins at one of `starts`."""
        self.left -= 1 + len(starts)
        if self.left < 0:
            raise FitError(f"the pattern {_quoted(self.pattern)} takes too much work to match", hint=_HINT)
        if isinstance(node, _One):
            return frozenset(at + 1 for at in starts if at < len(self.text) and node.takes(self.text[at]))
        if isinstance(node, _Anchor):
            return frozenset(at for at in starts if node.holds(self.text, at))
        if isinstance(node, _Choice):
            return frozenset().union(*(self.ends(branch, starts) for branch in node.branches))
        if isinstance(node, _Repeat):
            return self._repeated(node, starts)
        for item in node.items:
            if not starts:
                break
            starts = self.ends(item, starts)
        return starts

    def _repeated(self, node: _Repeat, starts: frozenset[int]) -> frozenset[int]:
        # Beyond as many repetitions as there are characters, one of them is empty and another changes nothing.
        enough = len(self.text) + 1
        for _ in range(min(node.least, enough)):
            starts = self.ends(node.item, starts)
            if not starts:
                return starts
        found, new = starts, starts
        most = enough if node.most is None else min(node.most - node.least, enough)
        for _ in range(most):
            new = self.ends(node.item, new) - found
            if not new:
                break
            found |= new
        return found


class _Parser:
    """Recursive descent over the grammar of ``re`` as far as it is known here."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.depth = 0

    def parse(self) -> _Node:
        node = self._choice()
        if self.at < len(self.pattern):
            raise self._unknown()
        return node

    def _unknown(self) -> FitError:
        return FitError(
            f"the pattern {_quoted(self.pattern)} is no regular expression of the kind that is followed, from "
            f"character {self.at + 1} on",
            hint=_HINT,
        )

    def _peek(self) -> str:
        return self.pattern[self.at] if self.at < len(self.pattern) else ""

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise self._unknown()
        self.at += 1
        return character

    def _choice(self) -> _Node:
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise self._unknown()
        branches = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            branches.append(self._sequence())
        self.depth -= 1
        return branches[0] if len(branches) == 1 else _Choice(tuple(branches))

    def _sequence(self) -> _Node:
        items: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            items.append(self._repetition(self._atom()))
        return _Sequence(tuple(items))

    def _atom(self) -> _Node:
        character = self._take()
        if character == "(":
            return self._group()
        if character == "[":
            return self._set()
        if character == ".":
            return _One((lambda c: c == "\n",), negated=True)
        if character in "^$":
            return _Anchor(character)
        if character in "*+?":
            self.at -= 1
            raise self._unknown()
        return self._escape() if character == "\\" else _literal(character)

    def _group(self) -> _Node:
        if self._peek() == "?":
            named = re.compile(r"\?(:|P<[A-Za-z_]\w*>)").match(self.pattern, self.at)
            if named is None:
                raise self._unknown()
            self.at = named.end()
        node = self._choice()
        if self._peek() != ")":
            raise self._unknown()
        self.at += 1
        return node

    def _escape(self) -> _Node:
        character = self._take()
        if character in "AZbB":
            return _Anchor(character)
        if character.lower() in _CLASSES:
            return _One((_CLASSES[character.lower()],), negated=character.isupper())
        if character.isalnum() and character.isascii() and character not in _ESCAPES:
            self.at -= 1
            raise self._unknown()
        return _literal(_ESCAPES.get(character, character))

    def _set(self) -> _Node:
        negated = self._peek() == "^"
        self.at += negated
        fits: list[Callable[[str], bool]] = []
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._member()
            if self._peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                high = self._member()
                if not isinstance(low, str) or not isinstance(high, str) or low > high:
                    raise self._unknown()
                fits.append(_between(low, high))
            else:
                fits.append(_between(low, low) if isinstance(low, str) else low.takes)
        self.at += 1
        return _One(tuple(fits), negated)

    def _member(self) -> str | _One:
        """One character of a set, or a class in it."""
        character = self._take()
        if character != "\\":
            return character
        character = self._take()
        if character.lower() in _CLASSES:
            return _One((_CLASSES[character.lower()],), negated=character.isupper())
        if character.isalnum() and character.isascii() and character not in _ESCAPES:
            raise self._unknown()
        return _ESCAPES.get(character, character)

    def _repetition(self, item: _Node) -> _Node:
        counts = self._counts()
        if counts is None:
            return item
        # Lazy or not is the same for whether it matches; possessive is not.
        if self._peek() == "?":
            self.at += 1
        if self._peek() in ("+", "*") or (self._peek() == "?" or self._counted() is not None):
            raise self._unknown()
        least, most = counts
        if most is not None and most < least:
            raise self._unknown()
        return _Repeat(item, least, most)

    def _counts(self) -> tuple[int, int | None] | None:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._peek() in simple and self._peek():
            return simple[self._take()]
        counted = self._counted()
        if counted is None:
            return None
        self.at = counted.end()
        least, comma, most = counted.groups()
        low = int(least or 0)
        return low, (None if not most else int(most)) if comma else low

    def _counted(self) -> re.Match[str] | None:
        found = re.compile(r"\{(\d{0,9})(,?)(\d{0,9})\}", re.ASCII).match(self.pattern, self.at)
        return found if found is not None and (found[1] or found[2]) and not (found[3] and not found[2]) else None


_HINT = "give program=, which says how parameters are cut and replaces the checkpoint's own description"


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda c: low <= c <= high


def _literal(character: str) -> _One:
    return _One((_between(character, character),))


def _quoted(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")


@dataclass(slots=True)
class Patterns:
    """A list of patterns. `used` are those that have matched some name."""

    listed: tuple[str, ...]
    used: set[str] = field(default_factory=set)
    _names: dict[str, list[str]] = field(default_factory=dict)
    _nodes: list[tuple[str, _Node]] = field(default_factory=list)
    _left: int = _MOST_LIST_WORK

    @classmethod
    def of(cls, listed: Iterable[str]) -> Patterns:
        """FitError for a pattern that cannot be followed."""
        made = cls(tuple(dict.fromkeys(listed)))
        for pattern in made.listed:
            if len(pattern) > _MOST_CHARACTERS:
                raise FitError(f"the pattern {_quoted(pattern)} is {len(pattern)} characters long", hint=_HINT)
            if plain := _PLAIN.fullmatch(pattern):
                made._names.setdefault(re.sub(r"\\(.)", r"\1", plain[1], flags=re.DOTALL), []).append(pattern)
            else:
                made._nodes.append((pattern, _Parser(pattern).parse()))
        return made

    def matching(self, name: str) -> list[str]:
        """The patterns that match at the start of `name`, as ``re.match`` does; they count as used."""
        found = [*self._names.get(name, ()), *self._names.get(name.removesuffix("\n"), ())]
        found = list(dict.fromkeys(found))
        found += [pattern for pattern, node in self._nodes if self._matches(pattern, node, name)]
        self.used.update(found)
        return found

    def _matches(self, pattern: str, node: _Node, name: str) -> bool:
        matcher = _Matcher(pattern, name, min(_MOST_WORK, self._left))
        before = matcher.left
        found = bool(matcher.ends(node, frozenset({0})))
        self._left -= before - matcher.left
        return found

    @property
    def unused(self) -> list[str]:
        """Patterns that have matched no name so far."""
        return [pattern for pattern in self.listed if pattern not in self.used]
