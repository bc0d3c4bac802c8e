"""Numbered tensors that come together: what one layer lacks and others have, and layers that are missing whole."""

from __future__ import annotations

import pytest

from ucp.errors import FitError
from ucp.lang import parse
from ucp.lang.bind import bind
from ucp.lang.check import check
from ucp.lang.held import Held
from ucp.layout import Mesh

TEXT = """format 1
size n layers
let l = layers
in m.{l} <-> layers.{l} {
  a [n] <-> a
  in dense optional {
    b [n] <-> b
    c [n] <-> c
  }
  d [n] <-> d optional
}
"""
DENSE = ["m.0.a", "m.0.dense.b", "m.0.dense.c"]


def fits(*names: str, **config: int) -> None:
    bind(parse(TEXT), [Held(name, (2,), "float32") for name in names], mesh=Mesh({}), config=config)


def test_blocks_and_rules_that_are_optional_may_differ_between_layers() -> None:
    fits(*DENSE, "m.1.a", "m.1.d")
    fits("m.0.a", "m.1.a")


def test_a_rule_that_is_not_optional_finds_what_any_other_finds() -> None:
    with pytest.raises(FitError, match=r"layers\.1\.a is missing, but layers\.1\.d is there; its rule is .*:5"):
        fits("m.0.a", "m.1.d")


def test_the_rules_of_an_optional_block_come_together() -> None:
    with pytest.raises(FitError, match=r"layers\.1\.dense\.c is missing, but layers\.1\.dense\.b is there"):
        fits(*DENSE, "m.1.a", "m.1.dense.b")


@pytest.mark.parametrize(("layers", "problem"), [(3, r"there is none of layers\.2\."), (1, r"layers\.1\.a is there")])
def test_layers_are_counted_where_their_number_is_known(layers: int, problem: str) -> None:
    fits("m.0.a", "m.1.a", layers=2)
    with pytest.raises(FitError, match=f"l is {layers}, but {problem}"):
        fits("m.0.a", "m.1.a", layers=layers)


def test_messages_tell_the_lines_of_the_program_at_hand() -> None:
    """Programs that are equal share nothing that knows a line or a file."""
    first, second = parse(TEXT, file="first.ucp"), parse(TEXT.replace("size", "# more\nsize"), file="second.ucp")
    assert first == second
    assert [check(p).where(check(p).rules[0].equation) for p in (first, second)] == ["first.ucp:5", "second.ucp:6"]
