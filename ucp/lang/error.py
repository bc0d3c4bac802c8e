"""Errors in conversion programs, all of one form: where, what kind, the cause, the line with the place marked, a hint.

megatron.ucp:20:74: error[dims]: `ffm` is only on the right
   20 |   mlp.linear_fc2.weight  [hidden, ffn/tp]  <->  mlp.down.weight [hidden, ffm]
      |                                                                          ^^^
hint: did you mean `ffn`? known: d experts ffn groups heads hidden layers vocab
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal, get_args

from ucp.errors import ProgramError
from ucp.lang.ast import Program
from ucp.layout.expr import Span

Kind = Literal[
    "syntax",  # the text or the JSON document does not follow the grammar
    "limit",  # too long, too deep or too large
    "format",  # a version of the language that is not known
    "name",  # a name, a capture, or something declared twice or not at all
    "dtype",  # an element type that is not known
    "dims",  # the two sides do not have the same dims, or parts do not equal tensors
    "axis",  # a mesh axis is unknown, cuts twice, or does not fit a reduction
    "size",  # sizes contradict each other, do not divide, or are not known
    "flag",  # a condition names no flag
    "match",  # a tensor matches no rule or two, a rule matches nothing
    "cover",  # a logical tensor is not produced exactly once: a hole or an overlap
    "tie",  # a tie leads nowhere, in a circle, or to something that differs
    "state",  # an optimizer state is described twice, not at all, or wrongly
    "pack",  # a pack does not fit the flat buffers
    "place",  # a tensor lies where the rule says it does not, or the other way round
    "lossy",  # values would be narrowed without the word `lossy`
    "inverse",  # `<->` where only one direction is defined
]
KINDS: tuple[str, ...] = get_args(Kind)
"""Every kind of error. Kinds are only ever added."""

FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Characters that a program never holds: they have no look of their own, change how others look, or break lines."""

_WIDEST = 160
_MOST_KNOWN = 40


def program_error(
    source: Program | str | None,
    *,
    at: Span | None,
    kind: Kind,
    cause: str,
    hint: str | None = None,
    file: str | None = None,
    word: str | None = None,
) -> ProgramError:
    """The error to raise for what stands at `at` in `source`, a program or its text.

    `word` narrows the mark to its first occurrence at or after the start of `at`: an axis in a list, say.
    """
    text = source.text if isinstance(source, Program) else source
    name = file or (source.file if isinstance(source, Program) else "<program>")
    if at is None or text is None:
        return ProgramError(f"{name}: error[{kind}]: {_clean(cause)}", hint=hint)
    line = _line(text, at[0])
    number, first, last = _narrowed(at, line, word)
    return ProgramError(
        f"{name}:{number}:{first}: error[{kind}]: {_clean(cause)}\n{_quoted(line, number, first, last)}", hint=hint
    )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """A hint: what `word` was perhaps meant to be, and what there is. None where nothing is known."""
    names = sorted(set(known))
    if not names:
        return None
    some = " ".join(names[:_MOST_KNOWN]) + (" …" if len(names) > _MOST_KNOWN else "")
    close = get_close_matches(word[:200], names, n=1)
    return f"did you mean `{close[0]}`? known: {some}" if close else f"known: {some}"


def _line(text: str, number: int) -> str:
    """Line `number` of `text`, without splitting all of it."""
    start = 0
    for _ in range(number - 1):
        start = text.find("\n", start) + 1
        if not start:
            return ""
    end = text.find("\n", start)
    return text[start:] if end < 0 else text[start:end]


def _narrowed(at: Span, line: str, word: str | None) -> Span:
    if word is not None:
        found = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)").search(line, at[1] - 1)
        if found:
            return at[0], found.start() + 1, found.end() + 1
    return at


def _quoted(line: str, number: int, first: int, last: int) -> str:
    """The line under its number, and carets under columns `first` to `last`; the middle of a very long line."""
    start = max(0, first - 1 - _WIDEST // 2) if len(line) > _WIDEST else 0
    shown = line[start : start + _WIDEST]
    before, after = "…" if start else "", "…" if start + len(shown) < len(line) else ""
    lead = "".join(map(_blank, before + shown[: first - 1 - start]))
    marks = "^" * max(1, sum(map(_columns, shown[first - 1 - start : last - 1 - start])))
    return f"{number:>5} | {before}{_clean(shown)}{after}\n{'':>5} | {lead}{marks}"


def _blank(character: str) -> str:
    return "\t" if character == "\t" else " " * _columns(character)


def _columns(character: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _clean(text: str) -> str:
    """Text that does nothing to a terminal: a program may come from anywhere."""
    return FORBIDDEN.sub("\ufffd", text)
