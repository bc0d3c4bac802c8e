"""Text and tree: formatting says what was parsed, in one way only."""

from __future__ import annotations

import pytest
from hypothesis import given

from ucp.lang import format_program, load_program, parse, shipped
from ucp.lang.ast import Comments, In, Program, Statement
from ucp.testing.programs import programs


@given(programs())
def test_parsing_what_was_formatted_gives_the_same_program(program: Program) -> None:
    text = format_program(program)
    found = parse(text)
    assert found == program
    assert format_program(found) == text


def remarks(statements: tuple[Statement, ...]) -> list[str]:
    """All comments in order."""
    found: list[str] = []
    for statement in statements:
        found += _of(statement.comments)
        if isinstance(statement, In):
            found += [*remarks(statement.body), *statement.tail]
    return found


def _of(comments: Comments) -> list[str]:
    return [*comments.before, *([] if comments.after is None else [comments.after])]


@given(programs())
def test_comments_are_kept_in_order(program: Program) -> None:
    found = parse(format_program(program))
    assert found.comments.before == program.comments.before
    assert remarks(found.statements) == remarks(program.statements)
    assert found.tail == program.tail


@pytest.mark.parametrize("name", shipped())
def test_shipped_programs_are_the_same_program_when_formatted(name: str) -> None:
    program = load_program(name)
    text = format_program(program)
    found = parse(text)
    assert found == program
    assert sum(len(_of(s.comments)) for s in found.statements) == sum(len(_of(s.comments)) for s in program.statements)
    assert format_program(found) == text


MESSY = """\
# About

format   1   # one

mesh\ttp   dp
size a
size   divisible=128
let r=heads/(groups*2)-min(a,b)

tie lm.w   to emb.w when   tied
state step:i64[]   any   tp dp
state exp_avg   exp_avg_sq:like param   lacking -1 each dp
flag tied  # short
flag other_flag# long
emb.w[(vocab+_  align 2  *  tp)/tp,hidden]<->embed.w
norm.w   [hidden] mean tp   <->n.w   unless tied   on pp   -1
in layers.{l/vpp/pp}<->layers.{l} {

  # The queries, keys and values.
  qkv [groups/tp (r d+d+d),
       hidden] # three
    <->q [groups r d,hidden],# one
       k [groups d,hidden],
       value_of_it [groups d,hidden] lossy optional # v
  fc [hidden,(ffn)/tp]->f[((hidden)),ffn]
  # the end
} when moe # after
drop **.x    "a b"
# the very end
"""

NEAT = """\
# About
format 1  # one

mesh tp dp
size a
size divisible = 128
let r = heads / (groups * 2) - min(a, b)

tie lm.w to emb.w when tied
state step               : i64[] any tp dp
state exp_avg exp_avg_sq : like param lacking -1 each dp
flag tied        # short
flag other_flag  # long
emb.w   [(vocab + _ align 2*tp)/tp, hidden]  <->  embed.w
norm.w  [hidden] mean tp                     <->  n.w  on pp -1 unless tied
in layers.{l/vpp/pp} when moe {
  # The queries, keys and values.
  # three
  # one
  qkv  [groups/tp (r d + d + d), hidden]  <->  q           [groups r d, hidden],
                                               k           [groups d, hidden],
                                               value_of_it [groups d, hidden]  optional lossy  # v
  fc   [hidden, ffn/tp]                   ->   f           [hidden, ffn]
  # the end
  # after
}
drop **.x "a b"
# the very end
"""


def test_one_way_to_write_it() -> None:
    assert format_program(parse(MESSY)) == NEAT


def test_a_long_rule_is_broken_before_its_arrow() -> None:
    rule = f"{'a' * 50} [hidden, ffn] <-> {'b' * 50} [hidden, ffn] when tied\nx [hidden] <-> y [hidden]\n"
    assert format_program(parse(f"format 1\n{rule}")) == (
        "format 1\n"
        f"{'a' * 50}  [hidden, ffn]\n"
        f"    <->  {'b' * 50} [hidden, ffn]  when tied\n"
        f"x  [hidden]  <->  y [hidden]\n"
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ('"mesh" any tp -> x', '"mesh"  any tp  ->  x'),
        ("mesh [x] -> x", "mesh  [x]  ->  x"),
        ('"mesh" f32[x] -> x', '"mesh"  f32[x]  ->  x'),
        ('"mesh" -> "in"', "mesh  ->  in"),
        ('"" -> "a b"', '""  ->  "a b"'),
        ('"{{{x}}}*" -> "\\\\\\""', '"{{{x}}}*"  ->  "\\\\\\""'),
        ('"a\\*\\*" -> b', '"a\\*\\*"  ->  b'),
    ],
)
def test_names_are_quoted_where_they_need_it(source: str, text: str) -> None:
    assert format_program(parse(f"format 1\n{source}")) == f"format 1\n{text}\n"


def test_a_program_nobody_spaced_is_spaced() -> None:
    text = "format 1\nsize a\nin x {\n  y  <->  z\n}\nb  <->  c\n"
    bare = parse(text)
    assert format_program(bare) == text
    built = Program(bare.statements)
    assert format_program(built) == "format 1\nsize a\n\nin x {\n  y  <->  z\n}\n\nb  <->  c\n"
