"""From JSON to a syntax tree, believing nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

from ucp.lang.ast import (
    Arrow,
    Capture,
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
from ucp.lang.canonical import canonical
from ucp.lang.json_value import Value
from ucp.lang.parser import DEEPEST_BLOCK, VERSION
from ucp.lang.scan import DTYPES
from ucp.layout.expr import Arith, Concat, Cut, Dim, Every, Expr, Layout, Name, Number, Operation, Pad, Product

_OPS = ("+", "-", "*", "/", "min", "max")
_STATEMENTS = "mesh axis size let flag rule in drop tie state pack"


def from_json(document: Any, *, file: str = "<json>") -> Program:
    """The program that `to_json` wrote as `document`.

    Its text and its positions are those of `format_program`. ProgramError for anything but the canonical form: unknown
    members, other types, members that say nothing, trees that no text has.
    """
    members = Value(document, file).members("format statements")
    version = members["format"].integer(least=0)
    if version != VERSION:
        members["format"].fail(f"version {version} of the language is not known", kind="format")
    found = tuple(_statement(value, 0) for value in members["statements"].items())
    return canonical(Program(found, version, file))


def _statement(value: Value, blocks: int) -> Statement:
    keyword, inside = value.only(_STATEMENTS)
    if keyword == "in":
        return _block(inside, blocks + 1)
    return _READERS[keyword](inside)


def _mesh(value: Value) -> MeshAxes:
    return MeshAxes(_identifiers(value.members("axes")["axes"]))


def _axis(value: Value) -> Factor:
    members = value.members("name parts")
    return Factor(members["name"].identifier(), _identifiers(members["parts"], least=2))


def _size(value: Value) -> Sizes:
    members = value.members("names", "default")
    names = _identifiers(members["names"])
    if "default" in members and len(names) > 1:
        members["default"].fail("one size at a time has a default")
    return Sizes(names, members["default"].integer(least=0) if "default" in members else None)


def _let(value: Value) -> Let:
    members = value.members("name value")
    return Let(members["name"].identifier(), _arithmetic(members["value"]))


def _flag(value: Value) -> Flags:
    return Flags(_identifiers(value.members("names")["names"]))


def _drop(value: Value) -> Drop:
    return Drop(tuple(_name(name, wild=True) for name in value.members("names")["names"].items(least=1)))


def _tie(value: Value) -> Tie:
    members = value.members("alias name", "conditions")
    return Tie(_name(members["alias"]), _name(members["name"]), _conditions(members))


def _pack(value: Value) -> Pack:
    members = value.members("name dim", "reversed")
    return Pack(
        _name(members["name"]), _expr(members["dim"], every=True), "reversed" in members and members["reversed"].true()
    )


def _state(value: Value) -> State:
    members = value.members("names", "layout lacking each reduce")
    names = tuple(name.state() for name in members["names"].items(least=1))
    layout = _layout(members["layout"]) if "layout" in members else None
    lacking: tuple[int, ...] = ()
    if "lacking" in members:
        lacking = tuple(dim.integer(least=-(10**18) + 1) for dim in members["lacking"].items(least=1))
        if layout is not None:
            members["lacking"].fail("`lacking` beside a layout")
    each = _identifiers(members["each"]) if "each" in members else ()
    return State(names, layout, lacking, each, _reduces(members))


def _rule(value: Value) -> Rule:
    members = value.members("source arrow targets", "reduce on conditions optional lossy")
    return Rule(
        _side(members["source"]),
        cast(Arrow, members["arrow"].one_of(("<->", "->", "<-"))),
        tuple(map(_side, members["targets"].items(least=1))),
        _reduces(members),
        _on(members),
        _conditions(members),
        "optional" in members and members["optional"].true(),
        "lossy" in members and members["lossy"].true(),
    )


def _block(value: Value, blocks: int) -> In:
    if blocks > DEEPEST_BLOCK:
        value.fail(f"more than {DEEPEST_BLOCK} blocks in each other", kind="limit")
    members = value.members("source target body", "on conditions optional")
    body = []
    for item in members["body"].items():
        if item.kind(_STATEMENTS) not in ("rule", "in"):
            item.fail("only rules and blocks stand in a block")
        body.append(_statement(item, blocks))
    optional = "optional" in members and members["optional"].true()
    source, target = _name(members["source"]), _name(members["target"])
    return In(source, target, tuple(body), _on(members), _conditions(members), optional)


_READERS: dict[str, Callable[[Value], Statement]] = {
    "mesh": _mesh,
    "axis": _axis,
    "size": _size,
    "let": _let,
    "flag": _flag,
    "rule": _rule,
    "drop": _drop,
    "tie": _tie,
    "state": _state,
    "pack": _pack,
}


def _identifiers(value: Value, *, least: int = 1) -> tuple[str, ...]:
    return tuple(item.identifier() for item in value.items(least=least))


def _on(members: dict[str, Value]) -> tuple[On, ...]:
    if "on" not in members:
        return ()
    places = [item.members("axis index") for item in members["on"].items(least=1)]
    return tuple(On(place["axis"].identifier(), place["index"].integer(least=-(10**18) + 1)) for place in places)


def _conditions(members: dict[str, Value]) -> tuple[Condition, ...]:
    if "conditions" not in members:
        return ()
    pairs = [item.only("when unless") for item in members["conditions"].items(least=1)]
    return tuple(Condition(flag.identifier(), word == "when") for word, flag in pairs)


def _reduces(members: dict[str, Value]) -> tuple[Reduce, ...]:
    if "reduce" not in members:
        return ()
    pairs = [item.only("any mean sum") for item in members["reduce"].items(least=1)]
    return tuple(Reduce(cast(Literal["any", "mean", "sum"], kind), _identifiers(axes)) for kind, axes in pairs)


def _side(value: Value) -> Side:
    members = value.members("name", "layout")
    return Side(_name(members["name"]), _layout(members["layout"]) if "layout" in members else None)


def _layout(value: Value) -> Layout:
    members = value.members("dims", "dtype")
    dims = tuple(_expr(item) for item in members["dims"].items())
    return Layout(dims, members["dtype"].one_of(DTYPES) if "dtype" in members else None)


def _name(value: Value, *, wild: bool = False) -> Pattern:
    return Pattern(tuple(_part(part, wild=wild) for part in value.items()))


def _part(value: Value, *, wild: bool) -> str | Capture | Computed | Wild:
    if not isinstance(value.value, dict):
        return value.string()
    kind = value.kind("capture computed wild")
    if kind == "computed":
        return Computed(_arithmetic(value.members("computed")["computed"]))
    if kind == "wild":
        if not wild:
            value.fail("`wild` is for `drop` only", kind="name")
        value.members("wild")["wild"].true()
        return Wild()
    members = value.members("capture", "cuts offset")
    offset = _arithmetic(members["offset"]) if "offset" in members else None
    return Capture(members["capture"].identifier(), _cuts(members), offset)


def _cuts(members: dict[str, Value]) -> tuple[Cut, ...]:
    if "cuts" not in members:
        return ()
    return tuple(Cut(*item.cut()) for item in members["cuts"].items(least=1))


def _expr(value: Value, *, every: bool = False) -> Expr:
    if not isinstance(value.value, dict):
        return Dim(_dim(value))
    kind = value.kind("dim product concat pad every")
    if kind == "pad":
        align = value.members("pad")["pad"].members("", "align")
        return Pad(_arithmetic(align["align"]) if align else None)
    if kind == "every":
        if not every:
            value.fail("`every` is for `pack` only")
        return Every(_expr(value.members("every")["every"]))
    members = value.members("dim cuts") if kind == "dim" else value.members(kind, "cuts")
    cuts = _cuts(members)
    if kind == "dim":
        return Dim(_dim(members["dim"]), cuts)
    inside = tuple(_expr(item, every=every) for item in members[kind].items(least=1))
    return Product(inside, cuts) if kind == "product" else Concat(inside, cuts)


def _dim(value: Value) -> str:
    return value.identifier() if isinstance(value.value, str) else str(value.integer(least=1))


def _arithmetic(value: Value) -> Arith:
    if isinstance(value.value, str):
        return Name(value.identifier())
    if not isinstance(value.value, list):
        return Number(value.integer(least=0))
    items = list(value.items())
    if len(items) != 3:
        value.fail("an operation is a list of operator, left and right")
    op = cast(Literal["+", "-", "*", "/", "min", "max"], items[0].one_of(_OPS))
    return Operation(op, _arithmetic(items[1]), _arithmetic(items[2]))
