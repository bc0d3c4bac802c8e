"""Whether some tensor name matches two patterns, and one that does."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from ucp.lang.ast import Capture, Computed
from ucp.lang.match import Matcher

_Token = tuple[str, str]
"""(kind, character): a literal character, or a run of digits or of anything but dots, of one or more."""


def both_match(first: Matcher, second: Matcher) -> str | None:
    """A name that both patterns match, or None where there is none. Captured numbers may carry any digits."""
    a, b = _tokens(first), _tokens(second)
    if not _may(a, b):
        return None
    return _search(a, b)


class Nearby:
    """Patterns met so far, by their dotted components: a few of thousands are compared with a new one."""

    def __init__(self) -> None:
        self._root: _Node = _Node({}, [])

    def met(self, matcher: Matcher, number: int) -> list[int]:
        """Numbers of the earlier patterns that might match a name that `matcher` does. Then it is `number` itself."""
        parts = [_text(component) for component in _components(_tokens(matcher))]
        nodes = [self._root]
        for part in parts:
            nodes = [child for node in nodes for child in node.like(part)]
        found = [earlier for node in nodes for earlier in node.ending]
        node = self._root
        for part in parts:
            node = node.children.setdefault(part, _Node({}, []))
        node.ending.append(number)
        return found


class _Node(NamedTuple):
    """What follows some components; None stands for one that is not all text."""

    children: dict[str | None, _Node]
    ending: list[int]

    def like(self, part: str | None) -> Iterable[_Node]:
        if part is None:
            return self.children.values()
        return [self.children[key] for key in (part, None) if key in self.children]


def _text(component: list[_Token]) -> str | None:
    text = "".join(character for _, character in component)
    return text if all(kind == "text" for kind, _ in component) else None


def _may(a: list[_Token], b: list[_Token]) -> bool:
    """Cheap tests first: as many components on both sides, and literal components equal."""
    left, right = _components(a), _components(b)
    if len(left) != len(right):
        return False
    return all(x == y or any(kind != "text" for kind, _ in (*x, *y)) for x, y in zip(left, right, strict=True))


def _components(tokens: list[_Token]) -> list[list[_Token]]:
    found: list[list[_Token]] = [[]]
    for token in tokens:
        if token == ("text", "."):
            found.append([])
        else:
            found[-1].append(token)
    return found


def _tokens(matcher: Matcher) -> list[_Token]:
    tokens: list[_Token] = []
    for part in matcher.pattern.parts:
        if isinstance(part, str):
            tokens.extend(("text", character) for character in part)
        elif isinstance(part, Computed) or (isinstance(part, Capture) and part.name in matcher.numbers):
            tokens.append(("digits", ""))
        else:
            tokens.append(("word", ""))
    return tokens


def _search(a: list[_Token], b: list[_Token]) -> str | None:
    """Breadth-first over pairs of places; a run may go on or end after each of its characters."""
    start = (0, 0, False, False)
    seen = {start}
    queue: deque[tuple[tuple[int, int, bool, bool], str]] = deque([(start, "")])
    while queue:
        (i, j, in_a, in_b), text = queue.popleft()
        if i == len(a) and j == len(b):
            return text
        steps: list[tuple[tuple[int, int, bool, bool], str]] = []
        if in_a:
            steps.append(((i + 1, j, False, in_b), text))
        if in_b:
            steps.append(((i, j + 1, in_a, False), text))
        if i < len(a) and j < len(b):
            character = _common(a[i], b[j])
            if character:
                run_a, run_b = a[i][0] != "text", b[j][0] != "text"
                steps.append(((i if run_a else i + 1, j if run_b else j + 1, run_a, run_b), text + character))
        for state, reached in steps:
            if state not in seen:
                seen.add(state)
                queue.append((state, reached))
    return None


def _common(x: _Token, y: _Token) -> str:
    """A character that both tokens take, or ""."""
    if x[0] == "text" and y[0] == "text":
        return x[1] if x[1] == y[1] else ""
    if x[0] != "text" and y[0] != "text":
        return "9"  # not below any usual offset
    character = x[1] if x[0] == "text" else y[1]
    run = y[0] if x[0] == "text" else x[0]
    if run == "digits":
        return character if character in "0123456789" else ""
    return character if character != "." else ""
