"""Declarations: the statements that are no rules."""

from __future__ import annotations

import re
from collections.abc import Callable

from ucp.lang.ast import Drop, Factor, Flags, Let, MeshAxes, Pack, Reduce, Sizes, State, Statement, Tie
from ucp.lang.parser_layout import LayoutParser
from ucp.lang.parser_names import pattern
from ucp.lang.parser_rules import axes, clauses, identifiers, reduces
from ucp.lang.scan import STATE, Mark, Scanner
from ucp.layout.expr import Layout

_LIKE = re.compile(r"like[ \t]+param(?![A-Za-z0-9_.\-])")
_TO = re.compile(r"to(?![A-Za-z0-9_.\-])")
_REVERSED = re.compile(r"reversed(?![A-Za-z0-9_.\-])")
_OF_STATE = re.compile(r"(?:lacking|each|any|mean|sum)(?![A-Za-z0-9_.\-])")
_SIGNED = re.compile(r"-?[0-9]")


def mesh(scanner: Scanner) -> MeshAxes:
    """``mesh pp tp dp``."""
    begin = _begin(scanner, "mesh")
    return MeshAxes(axes(scanner), scanner.since(begin))


def axis(scanner: Scanner) -> Factor:
    """``axis tp = kv * rep``."""
    begin = _begin(scanner, "axis")
    name = scanner.identifier("a mesh axis")
    _equals(scanner)
    parts = [scanner.identifier("a mesh axis")]
    scanner.blanks()
    while scanner.take("*"):
        scanner.blanks()
        parts.append(scanner.identifier("a mesh axis"))
        scanner.blanks()
    if len(parts) < 2:
        raise scanner.expected("`*`", hint=f"an axis is the product of two or more, as in `axis {name} = kv * rep`")
    return Factor(name, tuple(parts), scanner.since(begin))


def size(scanner: Scanner) -> Sizes:
    """``size hidden ffn`` or ``size divisible = 128``."""
    begin = _begin(scanner, "size")
    names = identifiers(scanner, "the name of a size")
    if not scanner.sees("="):
        return Sizes(names, None, scanner.since(begin))
    if len(names) > 1:
        raise scanner.error("one size at a time has a default", at=scanner.here(), hint=f"`size {names[-1]} = …`")
    _equals(scanner)
    return Sizes(names, scanner.number("a number"), scanner.since(begin))


def let(scanner: Scanner) -> Let:
    """``let r = heads / groups``."""
    begin = _begin(scanner, "let")
    name = scanner.identifier("the name of a size")
    _equals(scanner)
    value = LayoutParser(scanner).arithmetic()
    return Let(name, value, scanner.since(begin))


def flag(scanner: Scanner) -> Flags:
    """``flag tied``."""
    begin = _begin(scanner, "flag")
    return Flags(identifiers(scanner, "the name of a flag"), scanner.since(begin))


def drop(scanner: Scanner) -> Drop:
    """``drop **._extra_state rotary.**``."""
    begin = _begin(scanner, "drop")
    names = [pattern(scanner, wild=True)]
    while scanner.blanks() and not scanner.ended():
        names.append(pattern(scanner, wild=True))
    return Drop(tuple(names), scanner.since(begin))


def tie(scanner: Scanner) -> Tie:
    """``tie lm_head.weight to embed.weight when tied``."""
    begin = _begin(scanner, "tie")
    alias = pattern(scanner, what="a logical tensor's name")
    scanner.blanks()
    if not scanner.match(_TO):
        raise scanner.expected("`to`", hint="`tie ALIAS to NAME`: the second one holds the tensor")
    scanner.blanks()
    name = pattern(scanner, what="a logical tensor's name")
    scanner.blanks()
    found = clauses(scanner, ("when", "unless"))
    return Tie(alias, name, tuple(found.conditions), scanner.since(begin))


def pack(scanner: Scanner) -> Pack:
    """``pack optimizer.{g} reversed [(*param + _ align 2*dp)/dp]``."""
    begin = _begin(scanner, "pack")
    name = pattern(scanner, what="the name of the flat buffers")
    scanner.blanks()
    backwards = scanner.match(_REVERSED) is not None
    scanner.blanks()
    bracket = scanner.mark()
    if not scanner.sees("["):
        raise scanner.expected("`[`", hint="`pack NAME [(*param + _)/dp]`")
    dims = LayoutParser(scanner, every=True).dims()
    if len(dims) != 1:
        raise scanner.error("a flat buffer has one dim", at=scanner.since(bracket), kind="pack")
    return Pack(name, dims[0], backwards, scanner.since(begin))


def state(scanner: Scanner) -> State:
    """``state exp_avg exp_avg_sq : like param`` or ``state step : i64[] any dp``."""
    begin = _begin(scanner, "state")
    names = []
    while (name := scanner.match(STATE)) is not None:
        names.append(name)
        scanner.blanks()
    if not names:
        raise scanner.expected("the name of a state, or `*`")
    if not scanner.take(":"):
        raise scanner.expected("another state or `:`", hint="`state NAMES : like param` or `state NAMES : f32[]`")
    scanner.blanks()
    layout = None if scanner.match(_LIKE) else _own(scanner)
    scanner.blanks()
    lacking, each, reductions = _rest(scanner, layout)
    return State(tuple(names), layout, lacking, each, reductions, scanner.since(begin))


def _own(scanner: Scanner) -> Layout:
    layout = LayoutParser(scanner).layout()
    if layout is None:
        raise scanner.expected("`like param` or a layout")
    return layout


def _rest(scanner: Scanner, layout: Layout | None) -> tuple[tuple[int, ...], tuple[str, ...], tuple[Reduce, ...]]:
    """What follows in a `state`: dims that are lacking, axes with a state each, what is done with replicas."""
    lacking: tuple[int, ...] = ()
    each: tuple[str, ...] = ()
    reductions: tuple[Reduce, ...] = ()
    while scanner.looks(_OF_STATE):
        begin = scanner.mark()
        if found := reduces(scanner):
            reductions += found
            continue
        word = scanner.match(_OF_STATE) or ""
        if lacking if word == "lacking" else each:
            raise scanner.error(f"`{word}` twice", at=scanner.since(begin))
        scanner.blanks()
        if word == "each":
            each = axes(scanner)
        elif layout is not None:
            hint = "`lacking` is about the parameter's dims: `like param lacking -1`"
            raise scanner.error("`lacking` beside a layout", at=scanner.since(begin), hint=hint)
        else:
            lacking = _dims(scanner)
    return lacking, each, reductions


def _dims(scanner: Scanner) -> tuple[int, ...]:
    found = [scanner.signed("the number of a dim, negative from the last")]
    scanner.blanks()
    while scanner.looks(_SIGNED):
        found.append(scanner.signed("the number of a dim"))
        scanner.blanks()
    return tuple(found)


def _begin(scanner: Scanner, word: str) -> Mark:
    """Step over the statement's own word."""
    begin = scanner.mark()
    scanner.take(word)
    scanner.blanks()
    return begin


def _equals(scanner: Scanner) -> None:
    scanner.blanks()
    if not scanner.take("="):
        raise scanner.expected("`=`")
    scanner.blanks()


DECLARATIONS: dict[str, Callable[[Scanner], Statement]] = {
    "mesh": mesh,
    "axis": axis,
    "size": size,
    "let": let,
    "flag": flag,
    "drop": drop,
    "tie": tie,
    "pack": pack,
    "state": state,
}
