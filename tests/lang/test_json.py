"""Programs as JSON: nothing is lost, and nothing but the canonical form is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ucp.errors import NotFoundError, ProgramError
from ucp.lang import from_json, load_program, parse, shipped, to_json
from ucp.lang.ast import Program
from ucp.testing.programs import programs

SCHEMA = json.loads(files("ucp.spec").joinpath("program.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@given(programs())
def test_nothing_is_lost(program: Program) -> None:
    document = json.loads(json.dumps(to_json(program)))
    found = from_json(document)
    assert found == program
    assert to_json(found) == document
    assert not list(VALIDATOR.iter_errors(document))


@pytest.mark.parametrize("name", shipped())
def test_shipped_programs(name: str) -> None:
    program = load_program(name)
    document = to_json(program)
    assert from_json(document) == program
    VALIDATOR.validate(document)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(pairs):
        yield value, key
        yield from places(inside)


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2.5, 10**18, 10**400, float("nan")]),
    st.sampled_from(["", "x", "any", "a b", "/tp", "@", "é", "*", "**", "a\x00", "<->", "wild", "x] -> y [z", "_"]),
    st.sampled_from(
        [[], {}, [[]], ["+", 1], ["+", "a", "b"], {"pad": {}}, {"dim": "x"}, {"every": "x"}, {"wild": True}]
    ),
    st.sampled_from([{"product": ["a", "b"]}, {"concat": ["a", "b"], "cuts": ["/tp"]}, {"capture": "x", "cuts": []}]),
)


@given(programs().filter(lambda program: program.statements), WRONG, st.data())
def test_what_is_read_follows_the_schema(program: Program, wrong: Any, data: st.DataObject) -> None:
    document = copy.deepcopy(to_json(program))
    container, key = data.draw(st.sampled_from(list(places(document))))
    action = data.draw(st.sampled_from(["replace", "remove", "insert"]))
    if action == "replace":
        container[key] = wrong
    elif action == "remove":
        del container[key]
    elif isinstance(container, dict):
        container[data.draw(st.sampled_from(["optional", "cuts", "lossy", "dtype", "offset", "nonsense"]))] = wrong
    else:
        container.insert(key, wrong)
    try:
        found = from_json(document)
    except ProgramError:
        return
    assert to_json(found) == document
    assert not list(VALIDATOR.iter_errors(document))


def refusal(document: Any) -> str:
    with pytest.raises(ProgramError) as caught:
        from_json(document, file="p.json")
    return str(caught.value.message)


RULE = {"source": {"name": ["a"]}, "arrow": "->", "targets": [{"name": ["b"]}]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "p.json: error[syntax]: $: `None` is no object"),
        ({"format": 1}, "p.json: error[syntax]: $: `statements` is missing"),
        ({"format": 2, "statements": []}, "p.json: error[format]: $.format: version 2 of the language is not known"),
        ({"format": True, "statements": []}, "p.json: error[syntax]: $.format: `True` is no whole number"),
        (
            {"format": 1, "statements": [{}]},
            "p.json: error[syntax]: $.statements[0]: an object with one member is needed, not 0",
        ),
        (
            {"format": 1, "statements": [{"rules": RULE}]},
            "p.json: error[syntax]: $.statements[0]: `rules` is not known here",
        ),
        (
            {"format": 1, "statements": [{"rule": RULE | {"optional": False}}]},
            "p.json: error[syntax]: $.statements[0].rule.optional: `true` is all it can be; leave it out for `false`",
        ),
        (
            {"format": 1, "statements": [{"flag": {"names": ["a", "any"]}}]},
            "p.json: error[name]: $.statements[0].flag.names[1]: `any` cannot name a dim, a size, an axis or a flag",
        ),
        (
            {"format": 1, "statements": [{"rule": RULE | {"source": {"name": [{"wild": True}]}}}]},
            "p.json: error[name]: $.statements[0].rule.source.name[0]: `wild` is for `drop` only",
        ),
        (
            {"format": 1, "statements": [{"in": {"source": [], "target": [], "body": [{"flag": {"names": ["x"]}}]}}]},
            "p.json: error[syntax]: $.statements[0].in.body[0]: only rules and blocks stand in a block",
        ),
        (
            {"format": 1, "statements": [{"rule": RULE | {"source": {"name": ["a\x1b[2J"]}}}]},
            "p.json: error[syntax]: $.statements[0].rule.source.name[0]: the character U+001B may not be in a program",
        ),
    ],
)
def test_refusals_say_where(document: Any, message: str) -> None:
    assert refusal(document) == message


def with_dim(dim: Any) -> Any:
    side = {"name": ["a"], "layout": {"dims": [dim]}}
    return {"format": 1, "statements": [{"rule": RULE | {"source": side}}]}


@pytest.mark.parametrize(
    "dim",
    [
        {"product": ["a"]},
        {"product": ["a"], "cuts": ["/tp"]},
        {"product": ["a", {"product": ["b", "c"]}]},
        {"concat": ["a", {"concat": ["b", "c"]}]},
        {"product": [{"concat": ["a", "b"]}], "cuts": ["/tp"]},
        {"concat": ["a"]},
        {"dim": "a"},
        {"dim": "7"},
        {"dim": "a", "cuts": []},
        {"pad": {}},
        {"every": "a"},
        {"product": ["a", {"pad": {}}]},
        0,
    ],
    ids=json.dumps,
)
def test_one_form_only(dim: Any) -> None:
    refusal(with_dim(dim))


def test_the_deepest_text_is_read_again_from_json() -> None:
    deep = "a (b + " * 31 + "(c + _ align " + "d*" * 64 + "e)" + ")/tp" * 31
    text = "format 1\n" + "in x {\n" * 16 + f"a [{deep}] -> b\n" + "}\n" * 16
    program = parse(text.replace("(c + _", "c + _").replace("e)", "e"))
    assert from_json(to_json(program)) == program
    nested = "let a = " + "(b + " * 32 + "c" + ")" * 32
    assert from_json(to_json(parse(f"format 1\n{nested}"))) == parse(f"format 1\n{nested}")


def test_deep_documents() -> None:
    dim: Any = "a"
    for _ in range(100_000):
        dim = {"concat": ["a", dim], "cuts": ["/tp"]}
    assert "error[limit]" in refusal(with_dim(dim))
    block: Any = {"rule": RULE}
    for _ in range(17):
        block = {"in": {"source": [], "target": [], "body": [block]}}
    assert "error[limit]" in refusal({"format": 1, "statements": [block]})


def test_files(tmp_path: Path) -> None:
    text = "format 1\na [x] -> b\n"
    (tmp_path / "p.ucp").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    program = load_program(tmp_path / "p.ucp")
    assert program == parse(text)
    assert program.file == str(tmp_path / "p.ucp")
    (tmp_path / "p.json").write_text(json.dumps(to_json(program)))
    assert load_program(str(tmp_path / "p.json")) == program


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.ucp", b"format 1\na -> \xff", "byte 0xff on line 2 is not UTF-8"),
        ("x.json", b"{", "no JSON: "),
        ("x.json", b"[" * 100_000, "no JSON that can be read: too deep|no JSON: "),
        ("x.json", b"[" + b"1" * 10_000 + b"]", "no JSON: |no object"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ProgramError, match=message):
        load_program(tmp_path / name)


def test_names_that_are_none() -> None:
    with pytest.raises(NotFoundError, match="no program is called 'hf_lama'") as caught:
        load_program("hf_lama")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean `hf_llama`? known: ")
    with pytest.raises(NotFoundError, match=r"no_such.ucp: no such file"):
        load_program("no_such.ucp")
