"""Every input that fuzzing kept gives a result or a typed error, and keeps to what reading may cost and may touch."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.fuzz.target import CORPUS
from tests.fuzz.targets import TARGETS
from tests.fuzz.watch import attempt

_SOUND = {"pickle": "seed-1"}
"""Seeds that are read, where the first is not: storages beside a pickle are those of no framework."""


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """A target that has read each of its inputs once, so that nothing is left to be imported at first use."""
    found = TARGETS[request.param]
    for path in found.inputs:
        found.warm(path.read_bytes())
    return request.param


def test_inputs_keep_to_the_rules(target: str) -> None:
    inputs = TARGETS[target].inputs
    assert inputs
    for path in inputs:
        try:
            TARGETS[target].watched(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{target}: {path.name}: {error!r}") from error


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_framework_wrote_is_read(name: str) -> None:
    """Else the inputs around it would only show how it is refused."""
    seed = next(path for path in TARGETS[name].inputs if re.fullmatch(_SOUND.get(name, "seed-.*"), path.name))
    data = seed.read_bytes()
    TARGETS[name].warm(data)
    assert attempt(lambda: TARGETS[name].read(data)) is None


def test_no_corpus_is_forgotten() -> None:
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()
