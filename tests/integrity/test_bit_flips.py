"""One bit of one object is wrong: it is found, and nothing reads a wrong value.

In checkpoints of our own every bit of every object is under a digest. In a ``torch.save`` file the tensors and the
pickle are; what else is in the zip either does not matter or does not open.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.integrity.flipping import Tally, disturb, flips
from tests.integrity.made import make


@pytest.fixture(scope="module", params=["native", "universal", "torch"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("made") / request.param)


@pytest.fixture(scope="module", params=["native", "universal"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("made") / request.param, large=True)


def check(made: Path, tally: Tally) -> None:
    assert not tally.wrong
    if made.name != "torch":
        assert not tally.unfound
        assert tally.found > 0.99 * tally.bits
    assert tally.refused


def test_ends_and_some_others_of_every_object(made: Path, tmp_path: Path) -> None:
    check(made, disturb(made, tmp_path, flips(made, 3, random.Random(1)), every=2))


def test_every_digest_block_of_large_objects(large: Path, tmp_path: Path) -> None:
    found = [flip for flip in flips(large, 4, random.Random(2)) if flip.path.stat().st_size > 1 << 20]
    assert len(found) >= 8
    check(large, disturb(large, tmp_path, found, every=4))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_byte_of_small_objects_and_very_many_of_others(made: Path, tmp_path: Path) -> None:
    tally = disturb(made, tmp_path, flips(made, 1200, random.Random(3)), every=64)
    assert tally.bits > 1000
    check(made, tally)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_many_bytes_of_large_objects(large: Path, tmp_path: Path) -> None:
    check(large, disturb(large, tmp_path, flips(large, 60, random.Random(4)), every=8))
