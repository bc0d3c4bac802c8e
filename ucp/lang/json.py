"""The syntax tree as JSON: the canonical form that is kept in checkpoints (spec/program.schema.json)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ucp.lang.ast import (
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
from ucp.layout.expr import Arith, Cut, Dim, Every, Expr, Layout, Name, Number, Pad, Product

Json = dict[str, Any]


def to_json(program: Program) -> Json:
    """`program` as a JSON document, without positions and comments. Members that say nothing are left out."""
    return {"format": program.format, "statements": list(map(_statement, program.statements))}


def _statement(statement: Statement) -> Json:
    match statement:
        case MeshAxes():
            return {"mesh": {"axes": list(statement.axes)}}
        case Factor():
            return {"axis": {"name": statement.axis, "parts": list(statement.parts)}}
        case Sizes():
            default = {} if statement.default is None else {"default": statement.default}
            return {"size": {"names": list(statement.names), **default}}
        case Let():
            return {"let": {"name": statement.name, "value": _arithmetic(statement.value)}}
        case Flags():
            return {"flag": {"names": list(statement.names)}}
        case Drop():
            return {"drop": {"names": list(map(_name, statement.names))}}
        case Tie():
            names = {"alias": _name(statement.alias), "name": _name(statement.name)}
            return {"tie": names | _some(conditions=_conditions(statement.conditions))}
        case Pack():
            return {
                "pack": {"name": _name(statement.name), "dim": _expr(statement.expr)}
                | _some(reversed=statement.reverse)
            }
        case State():
            return {"state": _state(statement)}
        case Rule():
            return {"rule": _rule(statement)}
        case In():
            return {"in": _block(statement)}


def _some(**members: Any) -> Json:
    """Those of `members` that say something."""
    return {key: value for key, value in members.items() if value not in (False, None) and value != []}


def _state(state: State) -> Json:
    layout = None if state.layout is None else _layout(state.layout)
    rest = _some(layout=layout, lacking=list(state.lacking), each=list(state.each), reduce=_reduces(state.reduces))
    return {"names": list(state.names), **rest}


def _rule(rule: Rule) -> Json:
    return {
        "source": _side(rule.source),
        "arrow": rule.arrow,
        "targets": list(map(_side, rule.targets)),
        **_some(
            reduce=_reduces(rule.reduces),
            on=_on(rule.on),
            conditions=_conditions(rule.conditions),
            optional=rule.optional,
            lossy=rule.lossy,
        ),
    }


def _block(block: In) -> Json:
    return {
        "source": _name(block.source),
        "target": _name(block.target),
        "body": list(map(_statement, block.body)),
        **_some(on=_on(block.on), conditions=_conditions(block.conditions), optional=block.optional),
    }


def _on(places: Sequence[On]) -> list[Json]:
    return [{"axis": place.axis, "index": place.index} for place in places]


def _conditions(conditions: Sequence[Condition]) -> list[Json]:
    return [{"when" if condition.wanted else "unless": condition.flag} for condition in conditions]


def _reduces(reduces: Sequence[Reduce]) -> list[Mapping[str, list[str]]]:
    return [{reduce.kind: list(reduce.axes)} for reduce in reduces]


def _side(side: Side) -> Json:
    return {"name": _name(side.name)} | ({} if side.layout is None else {"layout": _layout(side.layout)})


def _layout(layout: Layout) -> Json:
    return _some(dtype=layout.dtype) | {"dims": list(map(_expr, layout.dims))}


def _name(pattern: Pattern) -> list[str | Json]:
    return list(map(_part, pattern.parts))


def _part(part: str | Capture | Computed | Wild) -> str | Json:
    match part:
        case str():
            return part
        case Wild():
            return {"wild": True}
        case Computed():
            return {"computed": _arithmetic(part.value)}
        case Capture():
            offset = {} if part.offset is None else {"offset": _arithmetic(part.offset)}
            return {"capture": part.name} | _cuts(part.cuts) | offset


def _cuts(cuts: Sequence[Cut]) -> Json:
    return _some(cuts=[("@" if cut.placed else "/") + cut.axis for cut in cuts])


def _expr(expr: Expr) -> str | int | Json:
    match expr:
        case Dim():
            name = expr.name if expr.literal is None else expr.literal
            return {"dim": name} | _cuts(expr.cuts) if expr.cuts else name
        case Pad():
            return {"pad": {} if expr.align is None else {"align": _arithmetic(expr.align)}}
        case Every():
            return {"every": _expr(expr.item)}
        case Product():
            return {"product": list(map(_expr, expr.items))} | _cuts(expr.cuts)
        case _:
            return {"concat": list(map(_expr, expr.parts))} | _cuts(expr.cuts)


def _arithmetic(value: Arith) -> str | int | list[Any]:
    if isinstance(value, Number):
        return value.value
    if isinstance(value, Name):
        return value.name
    return [value.op, _arithmetic(value.left), _arithmetic(value.right)]
