"""Several at one URL, in every order with few interruptions and in random ones: one wins, and nobody sees a mixture."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commit.scenes import scenes
from tests.commit.schedule import Stage, explore

SCENES = scenes()


@pytest.mark.parametrize("name", SCENES)
def test_interrupted_once(name: str) -> None:
    assert explore(Stage(SCENES[name]), switches=1) > 5


LONG = {"read while two overwrite"}
"""Has as many orders as all the others together."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in LONG else []) for name in SCENES]
)
def test_interrupted_twice(name: str) -> None:
    assert explore(Stage(SCENES[name]), switches=2) > 20


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_interrupted_three_times(name: str) -> None:
    assert explore(Stage(SCENES[name]), switches=3, stride=4) > 20


@settings(max_examples=50)
@given(data=st.data())
def test_in_random_orders(data: st.DataObject) -> None:
    scene = SCENES[data.draw(st.sampled_from(sorted(SCENES)), label="scene")]
    turn = st.tuples(st.sampled_from(sorted(scene.actors)), st.integers(1, 12))
    Stage(scene).run(data.draw(st.lists(turn, max_size=20), label="order"))
