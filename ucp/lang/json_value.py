"""A place in a JSON document: what is there must be what the caller asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from ucp.lang.error import FORBIDDEN, Kind, nearest, program_error
from ucp.lang.scan import IDENTIFIER, MOST_DIGITS, RESERVED, STATE

DEEPEST_JSON = 400
"""The most lists and objects in each other, below a statement."""

_CUT = re.compile(r"[/@]")


@dataclass(frozen=True, slots=True)
class Value:
    """A JSON value, the document it is of and where it stands in it."""

    value: Any
    file: str
    path: str = "$"
    depth: int = 0

    def fail(self, cause: str, *, kind: Kind = "syntax", hint: str | None = None) -> NoReturn:
        """Raise the error that this value has."""
        raise program_error(None, at=None, kind=kind, cause=f"{self.path}: {cause}", hint=hint, file=self.file)

    def _inside(self, value: Any, path: str) -> Value:
        if self.depth >= DEEPEST_JSON:
            self.fail(f"more than {DEEPEST_JSON} values in each other", kind="limit")
        return Value(value, self.file, self.path + path, self.depth + 1)

    def members(self, required: str, optional: str = "") -> dict[str, Value]:
        """The members of an object, which has all of `required`, perhaps some of `optional`, and no other."""
        found = self._object()
        missing = [key for key in required.split() if key not in found]
        if missing:
            self.fail(f"`{missing[0]}` is missing")
        known = [*required.split(), *optional.split()]
        for key in found:
            if key not in known:
                self.fail(f"{_shown(key)} is not known here", hint=nearest(str(key), known))
        return {key: self._inside(value, f".{key}") for key, value in found.items()}

    def _object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            self.fail(f"{_shown(self.value)} is no object")
        return self.value

    def only(self, known: str) -> tuple[str, Value]:
        """The one member of an object that has one, of those that are `known`."""
        found = self._object()
        if len(found) != 1:
            self.fail(f"an object with one member is needed, not {len(found)}", hint=f"one of: {known}")
        (key,) = self.members("", known)
        return key, self._inside(found[key], f".{key}")

    def kind(self, known: str) -> str:
        """Which of the `known` members an object has that is told apart by them."""
        found = [key for key in known.split() if key in self._object()]
        if len(found) != 1:
            self.fail(f"which of {known} it is cannot be told")
        return found[0]

    def items(self, *, least: int = 0) -> Iterator[Value]:
        """The items of a list, at least `least`."""
        if not isinstance(self.value, list):
            self.fail(f"{_shown(self.value)} is no list")
        if len(self.value) < least:
            self.fail(f"a list of at least {least} is needed")
        return (self._inside(value, f"[{i}]") for i, value in enumerate(self.value))

    def integer(self, *, least: int) -> int:
        """A whole number of at least `least` that is not too large."""
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            self.fail(f"{_shown(self.value)} is no whole number")
        if not least <= self.value < 10**MOST_DIGITS:
            self.fail(f"{_shown(self.value)} is out of range", kind="limit")
        return self.value

    def true(self) -> bool:
        """``true``; what is false is left out."""
        if self.value is not True:
            self.fail("`true` is all it can be; leave it out for `false`")
        return True

    def string(self) -> str:
        """Some text, not empty."""
        if not isinstance(self.value, str) or not self.value:
            self.fail(f"{_shown(self.value)} is no text")
        bad = FORBIDDEN.search(self.value)
        if bad or "\n" in self.value:
            self.fail(f"the character U+{ord(bad[0] if bad else chr(10)):04X} may not be in a program")
        return self.value

    def one_of(self, known: tuple[str, ...]) -> str:
        """One of the words that are `known`."""
        if self.string() not in known:
            self.fail(f"{_shown(self.value)} is not known here", hint=nearest(self.string(), known))
        return self.string()

    def identifier(self) -> str:
        """The name of a dim, a size, an axis, a flag or a capture."""
        name = self.string()
        if not IDENTIFIER.fullmatch(name) or name in RESERVED:
            self.fail(f"{_shown(name)} cannot name a dim, a size, an axis or a flag", kind="name")
        return name

    def state(self) -> str:
        """The name of an optimizer state, or ``*``."""
        if not STATE.fullmatch(self.string()):
            self.fail(f"{_shown(self.value)} cannot be the name of a state", kind="name")
        return self.string()

    def cut(self) -> tuple[str, bool]:
        """``/axis`` or ``@axis``: the axis, and whether it is ``@``."""
        text = self.string()
        if not _CUT.match(text):
            self.fail(f"{_shown(text)} is no cut", hint="`/axis` or `@axis`")
        return Value(text[1:], self.file, self.path, self.depth).identifier(), text[0] == "@"


def _shown(value: Any) -> str:
    """A value in a message: short."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = value if isinstance(value, str) else f"{value:.3g}" if isinstance(value, float) else None
    if text is None:
        text = "a number" if isinstance(value, int) and abs(value) >= 10**30 else str(value)
    return f"`{text[:60]}{'…' if len(text) > 60 else ''}`"
