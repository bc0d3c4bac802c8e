from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ucp.errors import CorruptError, FitError
from ucp.format.names import NAME_LIMIT, STATE_LIMIT, component, escape, unescape

UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
NASTY = st.text(st.sampled_from("aAbB.=@%/\\_-: éÉ\0u2f"), max_size=12)
NAMES = st.one_of(UNICODE, NASTY, st.text(st.sampled_from("xyXY."), min_size=150, max_size=400))
WINDOWS = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.weight", "model.layers.0.mlp.weight"),
        ("a/b", "a=2fb"),
        ("a\\b", "a=5cb"),
        ("..", "=2e=2e"),
        (".hidden", "=2ehidden"),
        ("trailing.", "trailing=2e"),
        ("100%", "100=25"),
        ("a@b", "a=40b"),
        ("a=b", "a=3db"),
        ("", "=z"),
        ("NUL", "=4eUL=u7"),
        ("con.weight", "=63on.weight"),
        ("zarr.json", "=7aarr.json"),
        ("__x", "=5f_x"),
        ("Layer.Norm", "Layer.Norm=u21"),
        ("café", "caf=c3=a9"),
    ],
)
def test_how_names_look(name: str, expected: str) -> None:
    assert escape(name) == expected


@given(NAMES)
@example("CON")
@example("..")
@example("=h")
def test_a_component_is_safe_everywhere(name: str) -> None:
    found = escape(name)
    assert 0 < len(found) <= NAME_LIMIT
    assert re.fullmatch(r"[A-Za-z0-9._=-]+", found)
    assert not found.startswith((".", "__"))
    assert not found.endswith(".")
    assert found.lower().partition(".")[0] not in WINDOWS
    assert found.lower() != "zarr.json"


@given(NAMES)
@example("=u1")
@example("A=u1")
@example("0::A" + "\x80" * 13 + "\U00010000" * 6)
def test_names_come_back(name: str) -> None:
    back, length = unescape(escape(name)), len(escape(name))
    # A name that is cut may miss the limit by what is left of an escape of three bytes.
    assert back == name or (back is None and NAME_LIMIT - 2 <= length <= NAME_LIMIT)


@given(NAMES, NAMES)
@example("a", "A")
@example("aB", "Ab")
@example("", "z")
@example("Con", "cON")
@example(unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"))
def test_different_names_differ_even_without_case(one: str, other: str) -> None:
    assert (escape(one).lower() == escape(other).lower()) == (one == other)


@given(st.text(st.sampled_from("aAbB./é"), min_size=1, max_size=300), st.data())
def test_names_that_differ_by_case_only(name: str, data: st.DataObject) -> None:
    flips = data.draw(st.sets(st.integers(0, len(name) - 1)))
    other = "".join(char.swapcase() if i in flips else char for i, char in enumerate(name))
    assert (escape(name).lower() == escape(other).lower()) == (name == other)


@given(NAMES, NAMES, NAMES, NAMES)
def test_name_and_state_do_not_mix(name: str, state: str, other_name: str, other_state: str) -> None:
    one, other = component(name, state), component(other_name, other_state)
    assert len(one) <= NAME_LIMIT + 1 + STATE_LIMIT <= 200
    assert (one.lower() == other.lower()) == ((name, state) == (other_name, other_state))
    assert one.lower() != component(other_name).lower()


@pytest.mark.parametrize(
    "text", ["", "a=2Fb", "a=2", "=61", "a@b", ".a", "a=u", "a=u0", "a=u1", "a.", "=ff", "=z=z", "a/b", "con", "é"]
)
def test_only_what_escape_makes_is_read(text: str) -> None:
    with pytest.raises(CorruptError):
        unescape(text)


def test_a_lone_surrogate_is_no_name() -> None:
    with pytest.raises(FitError, match="Unicode"):
        escape("a\ud800")
