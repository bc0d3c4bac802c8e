"""The grammar of the specification, run by lark, accepts what the parser accepts, and nothing else."""

from __future__ import annotations

from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lark import Lark, UnexpectedInput

from tests.lang.test_errors import CASES, marked
from ucp.errors import ProgramError
from ucp.lang import format_program, load_program, parse, shipped
from ucp.lang.ast import Program
from ucp.lang.error import FORBIDDEN
from ucp.testing.programs import programs

GRAMMAR = Lark(files("ucp.spec").joinpath("conversion-language.lark").read_text(), parser="lalr")


def follows_grammar(text: str) -> bool:
    """Whether `text` follows the grammar, prepared as the specification says."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if FORBIDDEN.search(text):
        return False
    try:
        GRAMMAR.parse(text)
    except UnexpectedInput:
        return False
    return True


def is_parsed(text: str) -> bool | None:
    """Whether the parser takes `text`; None where only a limit speaks against it."""
    try:
        parse(text)
    except ProgramError as error:
        return None if "error[limit]" in error.message else False
    return True


def agreed(text: str) -> bool:
    parsed = is_parsed(text)
    return parsed is None or parsed == follows_grammar(text)


@pytest.mark.parametrize("name", shipped())
def test_shipped_programs(name: str) -> None:
    assert follows_grammar(load_program(name).text or "")


@given(programs())
def test_every_program_follows_the_grammar(program: Program) -> None:
    assert follows_grammar(format_program(program))


@pytest.mark.parametrize("text", [case[0] for case in CASES], ids=range(len(CASES)))
def test_what_is_refused_does_not(text: str) -> None:
    assert agreed(marked(text)[0])


PIECES = [
    *'\n\t {}[]()+-*/@_,:=#"\\.x07',
    "{{",
    "}}",
    "**",
    " -> ",
    "\n<-> ",
    "<-",
    "->",
    " in ",
    "\nin a {\n",
    "\n}\n",
    "any ",
    "when x ",
]
PIECES += [
    "optional",
    " lossy ",
    "mesh ",
    "\nstate x : ",
    "like param",
    " on pp -1",
    "min(",
    "align ",
    "f32",
    "lacking 1 ",
    "{x}",
    "\r\n",
    "\ufeff",
]


@given(programs(), st.data())
def test_they_agree_on_texts_that_are_nearly_programs(program: Program, data: st.DataObject) -> None:
    text = format_program(program)
    for _ in range(3):
        at = data.draw(st.integers(0, len(text)))
        until = data.draw(st.integers(at, min(len(text), at + 4)))
        text = text[:at] + data.draw(st.one_of(st.just(""), st.sampled_from(PIECES))) + text[until:]
        assert agreed(text)


@given(
    st.lists(
        st.sampled_from([*PIECES, "a", "b ", "let r = ", "tie a to b", "drop ", "pack a ", "size a", "[x]"]),
        max_size=12,
    )
)
def test_they_agree_on_noise(pieces: list[str]) -> None:
    assert agreed("format 1\n" + "".join(pieces))
