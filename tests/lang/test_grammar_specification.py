"""What the specification's text shows is what happens, and its lists are those of the code."""

from __future__ import annotations

import json
import re
import textwrap
from importlib.resources import files

import pytest

from ucp.errors import ProgramError
from ucp.lang import format_program, parse, to_json
from ucp.lang.check import check
from ucp.lang.error import KINDS
from ucp.lang.scan import DEEPEST, DTYPES, MOST_CHARACTERS, MOST_DIGITS, MOST_OPERATIONS, RESERVED

TEXT = files("ucp.spec").joinpath("conversion-language.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^#+ ", TEXT, flags=re.MULTILINE)}
EXAMPLES = {
    name: [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", part, re.MULTILINE)]
    for name, part in SECTIONS.items()
}


def test_the_first_example_is_a_sound_program_as_it_is_written() -> None:
    (example,) = EXAMPLES["The conversion language, version 1"]
    program = parse(example)
    check(program)
    assert format_program(program).split() == example.split()


def test_the_json_example() -> None:
    text, document = EXAMPLES["JSON"][-1].split("\n\n")
    (statement,) = to_json(parse(f"format 1\n{text}"))["statements"]
    assert statement == json.loads(document)


def test_the_error_example() -> None:
    (example,) = EXAMPLES["Errors"]
    place, quoted, _, hint = example.strip("\n").split("\n")
    line, column = map(int, place.split(":")[1:3])
    rule = quoted.partition(" | ")[2].strip()
    head = "format 1\nmesh tp\nsize d experts ffn groups heads hidden layers vocab"
    uses = "x [d, experts, groups, heads, layers, vocab] <-> x"
    program = parse(f"{head}{chr(10) * (line - 4)}\n  {rule}\n{uses}\n", file="megatron.ucp")
    with pytest.raises(ProgramError) as caught:
        check(program)
    assert caught.value.message.split("\n")[0] == place
    assert caught.value.message.split("\n")[2].index("^") - len("      | ") == column - 1
    assert f"hint: {caught.value.hint}" == hint


def test_lists() -> None:
    kinds = re.findall(r"^\| ((?:`[a-z]+`(?:, )?)+) \|", SECTIONS["Errors"], re.MULTILINE)
    assert sorted(word for row in kinds for word in re.findall(r"`([a-z]+)`", row) if word != "kind") == sorted(KINDS)
    assert f"reserved words `{' '.join(sorted(RESERVED))}`" in " ".join(SECTIONS["Text"].split())
    (types,) = re.findall(r"Element types are `([^`]+)`", SECTIONS["Layouts"])
    assert sorted(types.split()) == sorted(DTYPES)


def test_limits() -> None:
    text = " ".join(SECTIONS["Text"].split())
    assert f"at most {MOST_DIGITS} digits" in text
    assert f"brackets of all kinds {DEEPEST} deep, blocks 16 deep, {MOST_OPERATIONS} operations" in text
    assert f"2^{MOST_CHARACTERS.bit_length() - 1} characters" in text
