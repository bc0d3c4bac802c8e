"""What text means as a tree, where its nodes stand, and what no text can do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.errors import ProgramError
from ucp.lang import format_program, parse
from ucp.lang.ast import (
    Capture,
    Computed,
    Condition,
    Drop,
    In,
    On,
    Pack,
    Pattern,
    Program,
    Reduce,
    Rule,
    Side,
    State,
    Wild,
)
from ucp.layout.expr import Concat, Cut, Dim, Every, Layout, Name, Number, Operation, Pad, Product
from ucp.testing.programs import programs

HIDDEN, FFN, D, R, TP = Dim("hidden"), Dim("ffn"), Dim("d"), Dim("r"), Cut("tp")


def one(text: str) -> Any:
    """The only statement of a program."""
    (statement,) = parse(f"format 1\n{text}\n").statements
    return statement


def dim(text: str) -> Any:
    (found,) = one(f"a [{text}] -> b").source.layout.dims
    return found


def name(text: str) -> tuple[Any, ...]:
    return one(f"{text} -> b").source.name.parts


@pytest.mark.parametrize(
    ("text", "expr"),
    [
        ("hidden", HIDDEN),
        ("( hidden )", HIDDEN),
        ("7", Dim("7")),
        ("ffn/tp", Dim("ffn", (TP,))),
        ("ffn / tp @ ep", Dim("ffn", (TP, Cut("ep", placed=True)))),
        ("(ffn/tp)/dp", Product((Dim("ffn", (TP,)),), (Cut("dp"),))),
        ("r d", Product((R, D))),
        ("r (d ffn)", Product((R, D, FFN))),
        ("r(d ffn)/tp", Product((R, Product((D, FFN), (TP,))))),
        ("r d/tp", Product((R, Dim("d", (TP,))))),
        ("r + (d + ffn)", Concat((R, D, FFN))),
        ("r + (d + ffn)/tp", Concat((R, Concat((D, FFN), (TP,))))),
        ("(r + d) ffn", Product((Concat((R, D)), FFN))),
        ("r d + ffn", Concat((Product((R, D)), FFN))),
        ("(r + _)/tp", Concat((R, Pad()), (TP,))),
        ("r + _ align 2*tp", Concat((R, Pad(Operation("*", Number(2), Name("tp")))))),
        ("_ align (tp+1)/2 + r", Concat((Pad(Operation("/", Operation("+", Name("tp"), Number(1)), Number(2))), R))),
        ("align", Dim("align")),
        ("\n r # first\n\n + d\n", Concat((R, D))),
    ],
)
def test_dims(text: str, expr: Any) -> None:
    assert dim(text) == expr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 - 2 - 3", Operation("-", Operation("-", Number(1), Number(2)), Number(3))),
        ("1 - (2 - 3)", Operation("-", Number(1), Operation("-", Number(2), Number(3)))),
        ("a + b * c", Operation("+", Name("a"), Operation("*", Name("b"), Name("c")))),
        ("a * b / c", Operation("/", Operation("*", Name("a"), Name("b")), Name("c"))),
        ("min(a, max(1, b))", Operation("min", Name("a"), Operation("max", Number(1), Name("b")))),
        ("(\na # c\n)", Name("a")),
        ("minimum", Name("minimum")),
    ],
)
def test_arithmetic(text: str, value: Any) -> None:
    assert one(f"let r = {text}").value == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.b-c_1", ("a.b-c_1",)),
        ("-", ("-",)),
        ("a.{l/vpp/pp}.w", ("a.", Capture("l", (Cut("vpp"), Cut("pp"))), ".w")),
        ("{e@ep}", (Capture("e", (Cut("ep", placed=True),)),)),
        ("{l/pp+first-1}", (Capture("l", (Cut("pp"),), Operation("-", Name("first"), Number(1))),)),
        ("{=l+min(2,a)}", (Computed(Operation("+", Name("l"), Operation("min", Number(2), Name("a")))),)),
        ("{{a}}{{", ("{a}{",)),
        ('""', ()),
        ('"a b {l}\\"\\\\\\*"', ("a b ", Capture("l"), '"\\*')),
        ('"日本 # -> *"', ("日本 # -> *",)),
        ('"a{{b"', ("a{b",)),
    ],
)
def test_names(text: str, parts: tuple[Any, ...]) -> None:
    assert name(text) == parts


def test_a_rule() -> None:
    text = (
        "a bf16[] any tp dp mean ep\n\n# where\n <- b f32[], # two\n c when x on pp -1 lossy unless y on vpp 0 optional"
    )
    assert one(text) == Rule(
        Side(Pattern(("a",)), Layout((), "bf16")),
        "<-",
        (Side(Pattern(("b",)), Layout((), "f32")), Side(Pattern(("c",)))),
        (Reduce("any", ("tp", "dp")), Reduce("mean", ("ep",))),
        (On("pp", -1), On("vpp", 0)),
        (Condition("x", wanted=True), Condition("y", wanted=False)),
        optional=True,
        lossy=True,
    )


def test_words_are_names_where_names_stand() -> None:
    for word in "mesh axis size let flag state tie pack drop in format when on optional any".split():
        assert name(word) == (word,)
        assert one(f"{word} [x] <-> {word}").targets[0].name.parts == (word,)
        assert one(f"{word}\n  -> b").source.name.parts == (word,)
    assert one("in -> in").source.name.parts == ("in",)


def test_blocks() -> None:
    block = one("in a.{l/pp+2} {\n  in b\n   <-> c when x {\n x -> y\n }\n} on pp 0 optional")
    assert isinstance(block, In)
    assert block.target.parts == ("a.", Capture("l"))
    assert block.on == (On("pp", 0),)
    assert block.optional
    (inner,) = block.body
    assert isinstance(inner, In)
    assert inner.conditions == (Condition("x", wanted=True),)
    assert one("in a when x optional {\n}") == one("in a <-> a {\n} optional when x")


def test_other_statements() -> None:
    assert one("drop **.x a.**") == Drop((Pattern((Wild(), ".x")), Pattern(("a.", Wild()))))
    assert one("state * : like  param lacking -1 0 each dp mean tp") == State(
        ("*",), None, (-1, 0), ("dp",), (Reduce("mean", ("tp",)),)
    )
    stage_3 = Every(Concat((Dim("param"), Pad()), (Cut("dp"),)))
    assert one("pack {g} reversed [*((param + _)/dp)]") == Pack(Pattern((Capture("g"),)), stage_3, reverse=True)
    assert one("pack {g} [*(param + _)/dp]").expr == stage_3


def test_lines_may_end_anyhow_and_begin_with_a_mark() -> None:
    text = "format 1\nmesh tp\na [x,\n y] -> b\n"
    assert parse("\ufeff" + text.replace("\n", "\r\n")) == parse(text) == parse(text.rstrip())
    assert parse(text.replace(" ", "\t")) == parse(text)


def nodes(value: Any) -> Iterator[Any]:
    """Every node of a tree."""
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from nodes(getattr(value, field.name))
    elif isinstance(value, tuple):
        for inside in value:
            yield from nodes(inside)


@given(programs())
def test_every_node_knows_where_it_stands(program: Program) -> None:
    text = format_program(program)
    lines = text.split("\n")
    for node in nodes(parse(text)):
        if not hasattr(node, "at"):
            continue
        line, first, last = node.at
        piece = lines[line - 1][first - 1 : last - 1]
        assert piece
        assert piece == piece.strip()
        match node:
            case Number() | Name() as leaf:
                assert piece == str(leaf.value if isinstance(leaf, Number) else leaf.name)
            case Cut():
                assert piece == ("@" if node.placed else "/") + node.axis
            case Dim():
                assert piece == node.name + "".join(lines[c.at[0] - 1][c.at[1] - 1 : c.at[2] - 1] for c in node.cuts)
            case Capture() | Computed():
                assert piece[0] + piece[-1] == "{}"
            case On():
                assert piece == f"on {node.axis} {node.index}"
            case Condition():
                assert piece == f"{'when' if node.wanted else 'unless'} {node.flag}"
            case Layout():
                assert piece.endswith("]")


def test_a_node_on_several_lines_stands_on_its_first() -> None:
    rule = one("a [hidden,  # h\n   ffn] -> b")
    assert rule.source.layout.at == (2, 3, 16)
    assert rule.at == (2, 1, 16)
    assert rule.source.layout.dims[1].at == (3, 4, 7)


HOSTILE = {
    "brackets": "a [" + "(" * 250_000,
    "min": "let a = " + "min(" * 62_500,
    "blocks": "in a {\n" * 37_500,
    "sums": "let a = " + "b + " * 62_500 + "b",
    "cuts": "a [x" + "/tp" * 75_000 + "] -> b",
    "dims": "a [" + "x," * 100_000 + "x] -> b",
    "products": "a [" + "x " * 100_000 + "] -> b",
    "stars": "pack a [" + "*" * 250_000,
    "blank lines": "a [x" + "\n" * 250_000,
    "comments": "a [x" + "\n#" * 125_000,
    "rules": "a -> b\n" * 35_000,
    "names without arrow": "mesh" + "\n# x" * 62_500 + "\nmesh",
    "name": "a." * 125_000,
    "captures": "{a}." * 62_500 + " -> b",
    "wild": "drop " + "**." * 75_000,
    "quote": '"' + "a" * 250_000,
    "quoted braces": '"' + "{{" * 125_000 + '" -> b',
    "digits": "a [" + "9" * 250_000 + "] -> b",
    "targets": "a -> " + "b,\n" * 75_000 + "b",
    "clauses": "a -> b" + " when x" * 37_500,
    "blanks": "a" + " " * 250_000 + "-> b",
    "arrows": "a " + "<-" * 125_000,
    "control": "a" * 250_000 + "\0",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_takes_long(text: str) -> None:
    """A quarter of a megabyte: what grew with its square would take minutes."""
    begin = time.process_time()
    try:
        assert parse(f"format 1\n{text}").statements
    except ProgramError as error:
        message = error.message
    else:
        message = ""
    assert len(message) < 1000
    assert time.process_time() - begin < 20


def test_what_is_too_much() -> None:
    deepest = "a [" + "(" * 31 + "x" + ")" * 31 + "] -> b"
    assert one(deepest)
    for text in (
        deepest.replace("(x)", "((x))"),
        "let a = " + "b + " * 65 + "b",
        "in a {\n" * 17 + "}\n" * 17,
        "x" * (1 << 24),
    ):
        with pytest.raises(ProgramError, match=r"error\[limit\]"):
            parse(f"format 1\n{text}")
    assert one("in a {\n" * 16 + "}\n" * 16)
    assert one("let a = " + "b + " * 64 + "b")


@given(programs(), st.data())
def test_text_that_is_nearly_a_program_is_parsed_or_refused(program: Program, data: st.DataObject) -> None:
    text = format_program(program)
    at = data.draw(st.integers(0, len(text)))
    until = data.draw(st.integers(at, min(len(text), at + 5)))
    bit = data.draw(
        st.one_of(st.text(max_size=3), st.sampled_from(["\n", "[", "]", "{", "}", '"', " -> ", "#", "when"]))
    )
    try:
        found = parse(text[:at] + bit + text[until:])
    except ProgramError:
        return
    assert parse(format_program(found)) == found
