"""Hypothesis strategies for conversion programs: any syntax tree that has a text, whether or not it makes sense."""

from __future__ import annotations

from functools import cache
from typing import Literal

from hypothesis import strategies as st

from ucp.lang.ast import (
    Capture,
    Comments,
    Computed,
    Condition,
    Drop,
    Factor,
    Flags,
    In,
    Let,
    MeshAxes,
    On,
    Pack,
    Pattern,
    Program,
    Reduce,
    Rule,
    Side,
    Sizes,
    State,
    Statement,
    Tie,
    Wild,
)
from ucp.lang.scan import DTYPES, RESERVED
from ucp.layout.expr import Arith, Cut, Dim, Every, Expr, Layout, Name, Number, Operation, Pad, concat, product

NamePart = str | Capture | Computed | Wild

identifiers = st.one_of(
    st.sampled_from(
        "tp pp dp ep hidden ffn vocab heads groups d r l e like param align to reversed mesh f32 a_1".split()
    ),
    st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,6}", fullmatch=True).filter(lambda name: name not in RESERVED),
)
"""Names of dims, sizes, axes, flags and captures."""

cuts = st.lists(st.builds(Cut, identifiers, st.booleans()), max_size=2).map(tuple)
"""``/axis`` and ``@axis``, any number of them."""

_some_axes = st.lists(identifiers, min_size=1, max_size=3).map(tuple)
_numbers = st.one_of(st.integers(0, 20), st.integers(0, 10**18 - 1))
_state_names = st.one_of(
    st.sampled_from(["exp_avg", "step", "*"]), st.from_regex(r"[A-Za-z_][A-Za-z0-9_.\-]{0,5}", fullmatch=True)
)
_PLAIN = "layers. .weight mlp in drop mesh on when -1 a-b _x . {{ } 7 norm.bias q".split()
_QUOTED = ["a b", '"', "\\", "*", "**", "é", "#", "->", "\t"]
_words = st.sampled_from([*_PLAIN, *_QUOTED])


@cache
def arithmetic() -> st.SearchStrategy[Arith]:
    """What stands after ``=`` in a `let`."""
    leaves: st.SearchStrategy[Arith] = st.one_of(st.builds(Number, _numbers), st.builds(Name, identifiers))
    ops = st.sampled_from(("+", "-", "*", "/", "min", "max"))
    return st.recursive(leaves, lambda inner: st.builds(Operation, ops, inner, inner), max_leaves=6)


@cache
def expressions() -> st.SearchStrategy[Expr]:
    """A dim of a layout."""
    pads = st.builds(Pad, st.none() | arithmetic())
    names = st.one_of(identifiers, st.integers(1, 10**18 - 1).map(str))
    leaves: st.SearchStrategy[Expr] = st.builds(Dim, names, cuts)
    return st.recursive(
        leaves, lambda inner: st.one_of(_products(inner), _concats(st.one_of(inner, pads))), max_leaves=6
    )


def _products(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.builds(product, st.lists(inner, min_size=1, max_size=3).map(tuple), cuts)


def _concats(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.builds(concat, st.lists(inner, min_size=2, max_size=3).map(tuple), cuts)


@cache
def layouts() -> st.SearchStrategy[Layout]:
    """A layout with or without an element type."""
    dims = st.lists(expressions(), max_size=3).map(tuple)
    return st.builds(Layout, dims, st.none() | st.sampled_from(DTYPES))


@cache
def names(*, wild: bool = False) -> st.SearchStrategy[Pattern]:
    """A name with captures; with `wild`, of a `drop`."""
    special: list[st.SearchStrategy[NamePart]] = [
        st.builds(Capture, identifiers, cuts, st.none() | arithmetic()),
        st.builds(Computed, arithmetic()),
    ]
    if wild:
        special.append(st.just(Wild()))
    return st.lists(st.one_of(_words, _words, *special), max_size=4).map(_pattern)


def _pattern(parts: list[NamePart]) -> Pattern:
    """Neighbouring text joined, and no ``**`` beside another."""
    found: list[NamePart] = []
    for part in parts:
        before = found[-1] if found else None
        if isinstance(part, str) and isinstance(before, str):
            found[-1] = before + part
        elif not (isinstance(part, Wild) and isinstance(before, Wild)):
            found.append(part)
    return Pattern(tuple(found))


@cache
def sides() -> st.SearchStrategy[Side]:
    """A tensor of an equation."""
    return st.builds(Side, names(), st.none() | layouts())


_conditions = st.lists(st.builds(Condition, identifiers, st.booleans()), max_size=2).map(tuple)
_reduce_kinds: st.SearchStrategy[Literal["any", "mean", "sum"]] = st.sampled_from(("any", "mean", "sum"))
_reduces = st.lists(st.builds(Reduce, _reduce_kinds, _some_axes), max_size=2).map(tuple)
_on = st.lists(st.builds(On, identifiers, st.integers(-3, 3)), max_size=2).map(tuple)
_lines = st.lists(st.sampled_from(["", " a comment", "# [x -> {", " é"]), max_size=2).map(tuple)
comments = st.builds(Comments, _lines, st.none() | st.sampled_from(["", " why", " # {"]), st.booleans())
"""Comments around a statement."""


@cache
def rules() -> st.SearchStrategy[Rule]:
    """An equation."""
    targets = st.lists(sides(), min_size=1, max_size=3).map(tuple)
    arrows = st.sampled_from(("<->", "->", "<-"))
    flags = (st.booleans(), st.booleans())
    return st.builds(Rule, sides(), arrows, targets, _reduces, _on, _conditions, *flags, comments=comments)


@cache
def blocks() -> st.SearchStrategy[In]:
    """An `in` with rules and blocks."""

    def block(inner: st.SearchStrategy[Statement]) -> st.SearchStrategy[In]:
        body = st.lists(inner, max_size=3).map(tuple)
        rest = (_on, _conditions, st.booleans())
        return st.builds(In, names(), names(), body, *rest, comments=comments, tail=_lines)

    return block(st.recursive(rules(), block, max_leaves=4))


@cache
def packs() -> st.SearchStrategy[Pack]:
    """A flat buffer of many parameters."""
    every = st.builds(Every, expressions())
    parts = st.lists(st.one_of(every, expressions(), st.builds(Pad)), min_size=2, max_size=3).map(tuple)
    cut_every = st.builds(product, every.map(lambda one: (one,)), cuts)
    exprs = st.one_of(every, expressions(), st.builds(concat, parts, cuts), cut_every)
    return st.builds(Pack, names(), exprs, st.booleans(), comments=comments)


@cache
def states() -> st.SearchStrategy[State]:
    """How optimizer states lie."""
    named = st.lists(_state_names, min_size=1, max_size=3).map(tuple)
    lacking = st.lists(st.integers(-3, 3), max_size=2).map(tuple)
    each = st.lists(identifiers, max_size=2).map(tuple)
    like = st.builds(State, named, st.none(), lacking, each, _reduces, comments=comments)
    own = st.builds(State, named, layouts(), st.just(()), each, _reduces, comments=comments)
    return st.one_of(like, own)


@cache
def declarations() -> st.SearchStrategy[Statement]:
    """A statement that is neither a rule nor a block."""
    parts = st.lists(identifiers, min_size=2, max_size=3).map(tuple)
    wild = st.lists(names(wild=True), min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.builds(MeshAxes, _some_axes, comments=comments),
        st.builds(Factor, identifiers, parts, comments=comments),
        st.builds(Sizes, _some_axes, comments=comments),
        st.builds(Sizes, identifiers.map(lambda name: (name,)), _numbers, comments=comments),
        st.builds(Let, identifiers, arithmetic(), comments=comments),
        st.builds(Flags, _some_axes, comments=comments),
        st.builds(Drop, wild, comments=comments),
        st.builds(Tie, names(), names(), _conditions, comments=comments),
        packs(),
        states(),
    )


@cache
def programs() -> st.SearchStrategy[Program]:
    """A whole program."""
    statements = st.lists(st.one_of(declarations(), rules(), blocks()), max_size=5).map(tuple)
    return st.builds(Program, statements, comments=comments, tail=_lines, text=st.none() | st.just(""))
