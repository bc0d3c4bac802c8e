"""Tensor names of a program: text with captures, plain or in double quotes."""

from __future__ import annotations

import re

from ucp.lang.ast import Capture, Computed, Pattern, Wild
from ucp.lang.parser_layout import LayoutParser
from ucp.lang.scan import IDENTIFIER, Scanner
from ucp.layout.expr import Cut

PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")
_QUOTED = re.compile(r'[^"\\{}*\n]+|\*(?!\*)')
_ESCAPES = ('\\"', "\\\\", "\\*", "{{", "}}")

Part = str | Capture | Computed | Wild


def pattern(scanner: Scanner, *, what: str = "a tensor's name", wild: bool = False) -> Pattern:
    """The name that stands here; with `wild` it may have ``**``."""
    begin = scanner.mark()
    parts: list[Part] = []
    if scanner.take('"'):
        while not scanner.take('"'):
            parts.append(_quoted(scanner, wild=wild))
    else:
        while (part := _plain(scanner, wild=wild)) is not None:
            parts.append(part)
        if not parts:
            hint = 'a name with other characters than A-Z a-z 0-9 _ . - stands in double quotes; the empty name is ""'
            raise scanner.expected(what, hint=hint)
    return Pattern(_merged(parts), scanner.since(begin))


def _merged(parts: list[Part]) -> tuple[Part, ...]:
    """`parts` with neighbouring literal text joined."""
    found: list[Part] = []
    text: list[str] = []
    for part in parts:
        if isinstance(part, str):
            text.append(part)
            continue
        if text:
            found.append("".join(text))
            text = []
        found.append(part)
    if text:
        found.append("".join(text))
    return tuple(found)


def _plain(scanner: Scanner, *, wild: bool) -> Part | None:
    """The next part of a name without quotes; None at its end."""
    text = scanner.match(PLAIN)
    if text is not None:
        return text
    if scanner.sees("*"):
        return _wild(scanner, wild=wild)
    return _braces(scanner)


def _quoted(scanner: Scanner, *, wild: bool) -> Part:
    """The next part of a name in quotes."""
    text = scanner.match(_QUOTED)
    if text is not None:
        return text
    for escape in _ESCAPES[:3]:
        if scanner.take(escape):
            return escape[1]
    if scanner.sees("\\"):
        raise scanner.error('after a backslash stands `"`, `\\` or `*`', at=scanner.here(), kind="name")
    if scanner.sees("**"):
        return _wild(scanner, wild=wild)
    part = _braces(scanner)
    if part is None:
        raise scanner.expected('`"` at the end of the name')
    return part


def _wild(scanner: Scanner, *, wild: bool) -> Wild:
    begin = scanner.mark()
    if not scanner.take("**"):
        scanner.take("*")
        hint = "`{x}` matches a number or one dotted component; `**`, in `drop` only, matches anything"
        raise scanner.error("`*` has no meaning in a name", at=scanner.since(begin), kind="name", hint=hint)
    if not wild:
        hint = "`{x}` matches a number or one dotted component; a star itself is `\\*` in quotes"
        raise scanner.error("`**` is for `drop` only", at=scanner.since(begin), kind="name", hint=hint)
    if scanner.sees("**"):
        scanner.take("**")
        raise scanner.error("`**` twice in a row", at=scanner.since(begin), kind="name", hint="once is enough")
    return Wild(scanner.since(begin))


def _braces(scanner: Scanner) -> Part | None:
    """A capture, or a brace that is meant: ``{{``, ``}}``. None if no brace stands here."""
    for escape in _ESCAPES[3:]:
        if scanner.take(escape):
            return escape[0]
    if scanner.sees("}"):
        raise scanner.error("`}` without `{`", at=scanner.here(), kind="name", hint="a brace that is meant is `}}`")
    begin = scanner.mark()
    if not scanner.take("{"):
        return None
    if scanner.take("="):
        value = LayoutParser(scanner, tight=True).arithmetic()
        _end(scanner)
        return Computed(value, scanner.since(begin))
    if not scanner.looks(IDENTIFIER):
        hint = "`{x}`, without blanks; before the `{` of a block stands a blank; a brace that is meant is `{{`"
        raise scanner.expected("the name of a capture", kind="name", hint=hint)
    name = scanner.identifier("the name of a capture")
    cuts = tight_cuts(scanner)
    offset = LayoutParser(scanner, tight=True).arithmetic() if scanner.take("+") else None
    _end(scanner)
    return Capture(name, cuts, offset, scanner.since(begin))


def _end(scanner: Scanner) -> None:
    if not scanner.take("}"):
        hint = "`{x}`, `{x/axis}`, `{x+2}` or `{=x+2}`, without blanks"
        raise scanner.expected("`}`", kind="name", hint=hint)


def tight_cuts(scanner: Scanner) -> tuple[Cut, ...]:
    """``/axis`` and ``@axis``, any number of them, without blanks."""
    found: list[Cut] = []
    while True:
        begin = scanner.mark()
        placed = scanner.take("@")
        if not placed and not scanner.take("/"):
            return tuple(found)
        found.append(Cut(scanner.identifier("a mesh axis"), placed, scanner.since(begin)))
