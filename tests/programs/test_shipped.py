"""What holds for every program that comes with ucp: logical names are those of the table; and how ours are written."""

from __future__ import annotations

import re

import pytest

from tests.programs.names import table
from ucp.lang import load_program, shipped
from ucp.lang.check import check
from ucp.lang.format import format_program
from ucp.lang.match import describe

PROGRAMS = list(shipped())


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name.startswith("hf_")])
def test_sound_and_formatted(name: str) -> None:
    program = load_program(name)
    check(program)
    assert format_program(program) == shipped()[name].read_text()


@pytest.mark.parametrize("name", PROGRAMS)
def test_logical_names_are_those_of_the_table(name: str) -> None:
    targets = [describe(side.name) for rule in check(load_program(name)).rules for side in rule.equation.targets]
    listed = {re.sub(r"\{\w+\}", "{l}", logical) for logical in table()}
    assert targets
    assert {re.sub(r"^layers\.\{\w+\}", "layers.{l}", target) for target in targets} <= listed
