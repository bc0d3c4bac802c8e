"""Rules and blocks: equations between source tensors and logical ones, and the clauses after them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal, cast

from ucp.lang.ast import Arrow, Capture, Condition, In, On, Pattern, Reduce, Rule, Side, Statement
from ucp.lang.parser_layout import LayoutParser
from ucp.lang.parser_names import pattern
from ucp.lang.scan import IDENTIFIER, RESERVED, Mark, Scanner

_ARROW = re.compile(r"<->|->|<-")
_REDUCE = re.compile(r"(?:any|mean|sum)(?![A-Za-z0-9_.\-])")
_CLAUSE = re.compile(r"(?:on|when|unless|optional|lossy)(?![A-Za-z0-9_.\-])")

ARROWS = "`<->` both ways, `->` import only, `<-` export only"
"""The hint where an arrow is missing."""

_BLOCK = ("on", "when", "unless", "optional")

ReduceKind = Literal["any", "mean", "sum"]


class Clauses:
    """What may follow the targets, in any order: where, when, and what is allowed."""

    __slots__ = ("conditions", "on", "words")

    def __init__(self, words: set[str]) -> None:
        self.on: list[On] = []
        self.conditions: list[Condition] = []
        self.words = words


def rule(scanner: Scanner) -> Rule:
    """The rule that begins here, up to the end of its last line. Its comments are left to the caller."""
    begin = scanner.mark()
    source = side(scanner, what="a tensor's name or the first word of a statement")
    reductions = reduces(scanner)
    if not arrow_ahead(scanner):
        what = "an arrow" if reductions else "a layout, `any`, `mean`, `sum` or an arrow"
        raise scanner.expected(what, hint=ARROWS)
    arrow = cast(Arrow, scanner.match(_ARROW))
    scanner.blanks()
    targets = [side(scanner)]
    while scanner.take(","):
        scanner.space()
        targets.append(side(scanner))
    found = clauses(scanner, ("on", "when", "unless", "optional", "lossy"))
    return Rule(
        source,
        arrow,
        tuple(targets),
        reductions,
        tuple(found.on),
        tuple(found.conditions),
        "optional" in found.words,
        "lossy" in found.words,
        scanner.since(begin),
    )


def side(scanner: Scanner, *, what: str = "a tensor's name") -> Side:
    """A name and perhaps a layout, and the blanks after them."""
    name = pattern(scanner, what=what)
    scanner.blanks()
    return Side(name, LayoutParser(scanner).layout())


def arrow_ahead(scanner: Scanner) -> bool:
    """Whether an arrow comes next, on this line or as the first thing on the next line that is not blank."""
    before, comments = scanner.mark(), len(scanner.comments)
    if scanner.ended():
        scanner.space()
    if scanner.looks(_ARROW):
        return True
    scanner.back(before)
    del scanner.comments[comments:]
    return False


def reduces(scanner: Scanner) -> tuple[Reduce, ...]:
    """``any tp``, ``mean tp``, ``sum dp``: any number of them."""
    found = []
    while scanner.looks(_REDUCE):
        begin = scanner.mark()
        kind = cast(ReduceKind, scanner.match(_REDUCE))
        scanner.blanks()
        found.append(Reduce(kind, axes(scanner), scanner.since(begin)))
    return tuple(found)


def axes(scanner: Scanner) -> tuple[str, ...]:
    """One mesh axis or more."""
    return identifiers(scanner, "a mesh axis")


def identifiers(scanner: Scanner, what: str) -> tuple[str, ...]:
    """One identifier or more, up to something else or a reserved word."""
    found = [scanner.identifier(what)]
    scanner.blanks()
    while (word := IDENTIFIER.match(scanner.text, scanner.at)) and word[0] not in RESERVED:
        found.append(scanner.identifier(what))
        scanner.blanks()
    return tuple(found)


def clauses(scanner: Scanner, allowed: tuple[str, ...], words: set[str] | None = None) -> Clauses:
    """The clauses that stand here. `words` have been said before."""
    found = Clauses(words or set())
    while scanner.looks(_CLAUSE):
        begin = scanner.mark()
        word = scanner.match(_CLAUSE) or ""
        if word not in allowed:
            raise scanner.error(f"`{word}` does not belong here", at=scanner.since(begin))
        scanner.blanks()
        _clause(scanner, word, begin, found)
        scanner.blanks()
    return found


def _clause(scanner: Scanner, word: str, begin: Mark, found: Clauses) -> None:
    if word == "on":
        axis = scanner.identifier("a mesh axis")
        scanner.blanks()
        index = scanner.signed("a coordinate: a whole number, negative from the last")
        found.on.append(On(axis, index, scanner.since(begin)))
    elif word in ("when", "unless"):
        flag = scanner.identifier("a flag or a mesh axis")
        found.conditions.append(Condition(flag, word == "when", scanner.since(begin)))
    elif word in found.words:
        raise scanner.error(f"`{word}` twice", at=scanner.since(begin))
    else:
        found.words.add(word)


def block_head(scanner: Scanner) -> In:
    """``in source <-> target clauses {``: a block without its body."""
    begin = scanner.mark()
    scanner.take("in")
    scanner.blanks()
    source = pattern(scanner, what="the start of the source tensors' names")
    scanner.blanks()
    target = same_names(source)
    if arrow_ahead(scanner):
        if not scanner.take("<->"):
            hint = "a block is for both directions; the rules in it have arrows of their own"
            raise scanner.expected("`<->`", hint=hint)
        scanner.blanks()
        target = pattern(scanner, what="the start of the logical tensors' names")
        scanner.blanks()
    found = clauses(scanner, _BLOCK)
    if not scanner.take("{"):
        hint = "`in source <-> logical {`, the rules on lines of their own, `}`"
        raise scanner.expected("`{`", hint=hint)
    at = scanner.since(begin)
    return In(source, target, (), tuple(found.on), tuple(found.conditions), "optional" in found.words, at)


def block_end(scanner: Scanner, head: In, body: tuple[Statement, ...]) -> In:
    """The block that began with `head`: steps over ``}`` and over clauses, which may also stand there."""
    scanner.take("}")
    scanner.blanks()
    found = clauses(scanner, _BLOCK, {"optional"} if head.optional else set())
    if not scanner.ended():
        raise scanner.expected("`on`, `when`, `unless`, `optional` or the end of the line")
    on, conditions = (*head.on, *found.on), (*head.conditions, *found.conditions)
    return replace(head, body=body, on=on, conditions=conditions, optional="optional" in found.words)


def same_names(source: Pattern) -> Pattern:
    """The logical side of a block that gives one side only: the same names, whole numbers instead of cut ones."""
    parts = tuple(Capture(p.name, (), None, p.at) if isinstance(p, Capture) else p for p in source.parts)
    return Pattern(parts, source.at)
