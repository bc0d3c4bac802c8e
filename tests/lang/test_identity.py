"""The program of a checkpoint that needs none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.lang import format_program, from_json, to_json
from ucp.lang.bind import bind
from ucp.lang.held import Held
from ucp.lang.identity import identity
from ucp.layout import Mesh


def test_names_that_differ_in_numbers_share_a_rule() -> None:
    names = ["embed.weight", *(f"layers.{n}.mlp.{k}.weight" for n in range(3) for k in ("up", "down"))]
    assert format_program(identity(names)).splitlines() == [
        "format 1",
        "embed.weight                <->  embed.weight",
        "layers.{l}.mlp.up.weight    <->  layers.{l}.mlp.up.weight",
        "layers.{l}.mlp.down.weight  <->  layers.{l}.mlp.down.weight",
        "state * : like param",
    ]


odd = st.lists(
    st.text(st.sampled_from('ab01.{}*" é-'), min_size=1, max_size=8).filter(lambda name: name.strip(".") == name),
    min_size=1,
    max_size=12,
    unique=True,
)


@given(odd)
def test_any_names_are_mapped_to_themselves(names: list[str]) -> None:
    program = from_json(to_json(identity(names)))
    shapes = {name: (k + 1, 2) for k, name in enumerate(names)}
    held = [Held(name, shapes[name], "float32", {}, state) for name in names for state in ("value", "exp_avg")]
    bound = bind(program, held, mesh=Mesh({}))
    assert {name for name, _ in bound.tensors} == set(names)
    assert all(bound.tensors[name, "value"].shape == shape for name, shape in shapes.items())


@pytest.mark.parametrize("names", [[], ["1"], ["1.2", "1.3", "a.2"], ["x.01", "x.1"]])
def test_small_cases(names: list[str]) -> None:
    bound = bind(identity(names), [Held(name, (), "int64") for name in names], mesh=Mesh({}))
    assert {name for name, _ in bound.tensors} == set(names)
