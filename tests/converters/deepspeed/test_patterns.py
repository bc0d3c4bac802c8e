"""Patterns of foreign files against Python's own engine, and hostile ones against the clock."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.converters._deepspeed.patterns import Patterns
from ucp.errors import FitError

REAL = [
    r"tied_modules.embed.word_embeddings.weight",
    r"\d+.word_embeddings.weight",
    r"\d+.self_attention.dense.weight",
    r"\d+.weight",
    r"^model\.layers\.0\.mlp\.down_proj\.weight$",
    r".*\.(o_proj|down_proj)\.weight$",
    r"language_model\.encoder\.layers\.\d{1,3}\.mlp\.(?:dense_h_to_4h|w[12])\.weight",
    r"[a-z_]+\.[^.]+\.\w*\.bias\b",
]
NAMES = [
    "tied_modules.embed.word_embeddings.weight",
    "12.word_embeddings.weight",
    "3.self_attention.dense.weight",
    "4.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.mlp.down_proj.weight2",
    "modelxlayers.0.mlp.down_proj.weight",
    "language_model.encoder.layers.77.mlp.w1.weight",
    "blocks.0.attn.bias",
]
ATOMS = [r"a", r"b", r"\.", r".", r"\d", r"\D", r"\w", r"[a-c]", r"[^b\d]", r"[]a-]", r"\b", r"$", r"^", r"\B", r"\Z"]


@pytest.mark.parametrize("pattern", REAL)
@pytest.mark.parametrize("name", NAMES)
def test_real_patterns_match_as_in_python(pattern: str, name: str) -> None:
    patterns = Patterns.of([pattern])
    assert bool(patterns.matching(name)) == bool(re.match(pattern, name))
    assert bool(patterns.unused) != bool(re.match(pattern, name))


def repeated(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    suffix = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "{,2}", "*?", "{2}?"])
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, suffix).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


EXPRESSIONS = st.recursive(st.sampled_from(ATOMS), repeated, max_leaves=8)


# Not on an empty text, where \B matches since Python 3.14 and did not before; names are none.
@given(EXPRESSIONS, st.text("ab1._\n", min_size=1, max_size=8))
def test_random_patterns_match_as_in_python(pattern: str, text: str) -> None:
    assert bool(Patterns.of([pattern]).matching(text)) == bool(re.match(pattern, text))


@given(st.text(max_size=12))
def test_escaped_names_match_themselves_alone(name: str) -> None:
    patterns = Patterns.of([f"^{re.escape(name)}$"])
    for text in (name, name + "x", "x" + name, name + "\n"):
        assert bool(patterns.matching(text)) == bool(re.match(f"^{re.escape(name)}$", text))


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(a|a)*$", r"(a|aa)+$", r"((a?){30}){30}$", r"(.*)*(.*)*(.*)*b", r"a{999999999}" * 3 + "b"],
)
def test_catastrophic_patterns_take_no_time(pattern: str) -> None:
    start = time.process_time()
    with contextlib.suppress(FitError):
        assert Patterns.of([pattern]).matching("a" * 300 + "!") == []
    assert time.process_time() - start < 2


def test_too_much_work_is_an_error() -> None:
    hostile = "(?:" * 12 + "a?" + "){9}" * 12 + "b"
    with pytest.raises(FitError, match="too much work"):
        Patterns.of([hostile]).matching("a" * 200)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?=a)a",
        r"(a)\1",
        r"(?i)a",
        r"a++",
        r"(?P=x)",
        r"(",
        r"[a",
        r"a\q",
        r"*",
        r"a**",
        r"x" * 5000,
        "(" * 60 + ")" * 60,
    ],
)
def test_what_cannot_be_followed_is_refused(pattern: str) -> None:
    with pytest.raises(FitError, match="the pattern") as caught:
        Patterns.of([pattern])
    assert "program=" in (caught.value.hint or "")


def test_a_list_has_one_budget_for_all_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many names, each of which takes a pattern less work than is too much, still come to an end."""
    listed = Patterns.of(["a.*b.*c"])
    monkeypatch.setattr(listed, "_left", 2000)
    assert listed.matching("axxbxxc") == ["a.*b.*c"]
    with pytest.raises(FitError, match="too much work"):
        [listed.matching(f"axxb{number}") for number in range(1000)]
