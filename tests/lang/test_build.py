"""Programs made in Python are those that text gives."""

from __future__ import annotations

import doctest

import pytest

from ucp.errors import ProgramError
from ucp.lang import build, parse
from ucp.lang.ast import Statement
from ucp.lang.build import (
    axis,
    dim,
    dims,
    drop,
    every,
    flag,
    layout,
    let,
    mesh,
    pack,
    pad,
    pad_to,
    program,
    rule,
    size,
    state,
    tensor,
    tie,
    within,
)

groups, r, d, hidden, vocab, ffn, e, param = dims("groups r d hidden vocab ffn e param")

PAIRS: list[tuple[Statement, str]] = [
    (mesh("pp tp"), "mesh pp tp"),
    (axis("tp", "kv rep"), "axis tp = kv * rep"),
    (size("hidden ffn"), "size hidden ffn"),
    (size("divisible", 128), "size divisible = 128"),
    (let("r", " heads / (groups - 1) "), "let r = heads / (groups - 1)"),
    (flag("tied moe"), "flag tied moe"),
    (drop("**.x", "a b.{l}.**"), 'drop **.x "a b.{l}.**"'),
    (tie("lm.w", "emb.w", when="tied"), "tie lm.w to emb.w when tied"),
    (
        state("exp_avg *", lacking=[-1], each="dp", replicas={"mean": "tp"}),
        "state exp_avg * : like param lacking -1 each dp mean tp",
    ),
    (state("step", layout(dtype="i64"), replicas={"any": "tp dp"}), "state step : i64[] any tp dp"),
    (pack("o.{g}", (every(param) + pad_to("2*dp")) / "dp"), "pack o.{g} [(*param + _ align 2*dp)/dp]"),
    (pack("o.{g}", every((param + pad) / "dp"), reverse=True), "pack o.{g} reversed [*((param + _)/dp)]"),
    (pack("o", every(param) / "dp"), "pack o [(*param)/dp]"),
    (rule(tensor("a"), tensor("b")), "a <-> b"),
    (rule(tensor("a")[()], tensor("b"), arrow="->"), "a [] -> b"),
    (
        rule(tensor("a", "bf16")[hidden], tensor("b", "f32")[hidden], arrow="<-", lossy=True),
        "a bf16[hidden] <- b f32[hidden] lossy",
    ),
    (
        rule(
            tensor("a")[(vocab + pad) / "tp", hidden], tensor("b"), on={"pp": -1}, when="x y", unless="z", optional=True
        ),
        "a [(vocab + _)/tp, hidden] <-> b on pp -1 when x when y unless z optional",
    ),
    (
        rule(
            tensor("l.{l/vpp/pp}")[groups / "tp" * (r * d + d + d), hidden],
            tensor("q.{l}"),
            tensor("{=l+1}"),
            tensor("v"),
        ),
        "l.{l/vpp/pp} [groups/tp (r d + d + d), hidden] <-> q.{l}, {=l+1}, v",
    ),
    (rule(tensor("a")[e @ "ep" / "tp", 2 * d * 3, 1], tensor("b")), "a [e@ep/tp, 2 d 3, 1] <-> b"),
    (rule(tensor("a")[(r * d) / "tp", 1 + d + 2], tensor("b")), "a [(r d)/tp, 1 + d + 2] <-> b"),
    (rule(tensor("a")[((r + d) / "tp" * d) / "kv" / "rep"], tensor("b")), "a [((r + d)/tp d)/kv/rep] <-> b"),
    (rule(tensor("a")[r * (d * e) * hidden], tensor("b")), "a [r d e hidden] <-> b"),
    (rule(tensor('a "b" \\')[dim(7)], tensor("")), r'"a \"b\" \\" [7] <-> ""'),
    (
        within("l.{l/pp}", None, rule(tensor("x"), tensor("y")), within("m", "n", when="f"), optional=True),
        "in l.{l/pp} <-> l.{l} optional {\n x <-> y\n in m <-> n when f {\n }\n}",
    ),
]


@pytest.mark.parametrize(("built", "text"), PAIRS, ids=[text for _, text in PAIRS])
def test_the_same_tree_as_text(built: Statement, text: str) -> None:
    assert program(built) == parse(f"format 1\n{text}")


def test_what_is_built_has_positions() -> None:
    (made,) = program(rule(tensor("a")[hidden], tensor("b"))).statements
    assert made.at == (2, 1, 20)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (mesh("any"), "`any` is a word of the language, not a mesh axis"),
        (mesh(""), "expected the end of the statement|expected a layout"),
        (axis("tp", "kv"), r"expected `\*`"),
        (size("a b", 3), "one size at a time has a default"),
        (rule(tensor("a")[dim("x y")], tensor("b")), "canonical form"),
        (rule(tensor("a")[dim("x] -> c [y")], tensor("b")), "expected"),
        (rule(tensor("a")[pad], tensor("b")), "`_` is a part of a concatenation"),
        (rule(tensor("a")[pad * d], tensor("b")), "part of a concatenation"),
        (rule(tensor("a")[every(d)], tensor("b")), r"`\*` is for `pack` only"),
        (rule(tensor("a")[dim(0)], tensor("b")), "at least 1"),
        (rule(tensor("a", "f31")[d], tensor("b")), "no element type"),
        (within("a", "b", flag("c")), "outside of blocks only"),  # type: ignore[arg-type]
        (state("a b", layout(d), lacking=[1]), "`lacking` beside a layout"),
    ],
)
def test_the_grammar_holds(statement: Statement, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        program(statement)


@pytest.mark.parametrize("text", ["{x", "{x} }", "a**", "{1}", "x\ny"])
def test_a_name_is_parsed_at_once(text: str) -> None:
    with pytest.raises(ProgramError):
        tensor(text)


@pytest.mark.parametrize("text", ["", "a b", "a +", "(a", "a # b"])
def test_arithmetic_is_parsed_at_once(text: str) -> None:
    with pytest.raises(ProgramError) as caught:
        let("r", text)
    assert caught.value.message.startswith("<arithmetic>:1:")


def test_the_example() -> None:
    found = doctest.testmod(build)
    assert found.attempted
    assert not found.failed
