"""Programs and names that are wrong in unusual ways, or meant to take for ever: refused, and soon."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from ucp.errors import FitError, ProgramError
from ucp.lang import parse
from ucp.lang.arrays import gather
from ucp.lang.check import check
from ucp.layout import Mesh


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    begin = time.perf_counter()
    yield
    assert time.perf_counter() - begin < 5


def checked(*lines: str) -> None:
    check(parse("\n".join(("format 1", "mesh tp", "size a", "w [a/tp] <-> w [a]", *lines))))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("x <-> x", "y <-> y", "tie x to y", "tie y to x"), "leads to a name that is tied itself"),
        (("x <-> x", "tie x to x"), "leads to a name that is tied itself"),
        (("x <-> x", "y <-> y", "z <-> z", "tie x to y", "tie x to z"), "tied twice"),
        (("x <-> x", "tie x to y.{=a+1}"), "without captures"),
        (("drop m.{=a+3}",), "captures plainly"),
        (("drop m.{x+3}",), "captures plainly"),
        (("drop m.{x/tp}",), "captures plainly"),
        (("x.{k}{l} <-> x.{k}.{l}",), "where one ends cannot be told"),
        (("x.{k}1{l} <-> x.{k}.{l}",), "where one ends cannot be told"),
        (("x <- y", "x <- z"), "would match this rule and that of line 5"),
        (("x <-> y", "x <- z"), "would match this rule and that of line 5"),
        ((f"x [{' '.join(['(a + a)'] * 40)}] <-> y",), "choices of parts"),
        ((f"x [{', '.join(['(a + a)'] * 40)}] <-> y",), "choices of parts"),
        ((f"x [a] <-> y [{' '.join(['(a + a)'] * 40)}]",), "choices of parts"),
        (("x <-> x", f"state s : f32[{' '.join(['(a + a)'] * 40)}]"), "choices of parts"),
    ],
)
def test_what_cannot_be_right_is_refused(lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        checked(*lines)


@pytest.mark.parametrize(
    "lines",
    [
        ("x -> y", "x <- z"),
        ("flag f", "x <-> x", "y <-> y", "z <-> z", "tie x to y when f", "tie x to z unless f"),
        ("x.3{k} <-> x.{k}",),
        ("x.{k}x1{l} <-> x.{k}.{l}",),
    ],
)
def test_what_is_sound_passes(lines: tuple[str, ...]) -> None:
    checked(*lines)


def found(program: str, *names: str) -> list[str]:
    shards = {(): {name: np.zeros(2, np.float32) for name in ("w", *names)}}
    return [*gather(parse(f"format 1\nsize a\nw [a] <-> w [a]\n{program}\n"), shards, mesh=Mesh({}))]


def test_a_number_beside_a_digit() -> None:
    assert found("x.e1{k}.w [a] <-> x.{k} [a]", "x.e10.w") == ["w", "x.0"]


def test_a_word_stays_out_of_a_number_on_the_other_side() -> None:
    """``{x}`` shares a component with other text on the right, and is a number on both sides."""
    with pytest.raises(FitError, match="no rule"):
        found("a.{x}.w [a] <-> b.layer{x}.w [a]", "a.01.w")
    assert found("a.{x}.w [a] <-> b.layer{x}.w [a]", "a.0.w") == ["w", "b.layer0.w"]


def test_wild_names_take_no_time() -> None:
    drop = "drop " + "**a" * 12 + "**b"
    assert found(drop, "a" * 300 + "b") == ["w"]
    with pytest.raises(FitError, match="no rule"):
        found(drop, "a" * 300)


@pytest.mark.parametrize("name", ["x.1.y.2.z", "x.1.y.y.2.z", "x.x.y.z.1.y.2.z"])
def test_several_wild_parts(name: str) -> None:
    assert found("drop **x.{k}.**y.{l}.**z", name) == ["w"]


def test_numbers_of_thousands_of_digits() -> None:
    with pytest.raises(FitError, match="no rule"):
        found("l.{l}x [a] <-> l.{l} [a]", f"l.{'9' * 5000}x")


def test_many_rules() -> None:
    rules = (f"model.part{'abc'[k % 3]}.n{k}x.w [a] <-> m.n{k}x.w [a]" for k in range(4000))
    checked(*rules)
