"""Training state of real jobs, saved by some ranks and loaded by as many, more or fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.support.gloo import spawn
from tests.train.state.jobs import SAMPLES, differ, go_on, start

Saved = tuple[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """What two ranks saved after four steps of eight samples, and what they knew and did then."""
    url = str(tmp_path_factory.mktemp("jobs") / "saved")
    return url, spawn(start, 2, url, 4, 5)


def test_the_same_layout_goes_on_as_if_nothing_had_happened(saved: Saved) -> None:
    url, before = saved
    after = spawn(go_on, 2, url, 5, 4, 0)
    for old, new in zip(before, after, strict=True):
        assert new["losses"] == old["losses"]
        assert new["start"] == old["seen"]
        assert all(new[key] == old[key] for key in ("lr", "scaler", "counts", "position"))
        assert new["notes"] == ()
        assert new["left"] == ()


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_another_number_of_ranks_and_a_policy_for_everything(saved: Saved, world: int) -> None:
    url, before = saved
    after = spawn(go_on, world, url, 30 // world, 2, 1)
    again = spawn(go_on, world, url, 2, 2, 0) if world > 1 else after
    seen = sorted(sample for old in before for sample in old["seen"])
    assert sorted(sample for new in after for sample in new["start"]) == seen
    for new, repeated in zip(after, again, strict=True):
        assert all(new[key] == before[0][key] for key in ("lr", "scaler", "counts", "position"))
        assert any("starts anew" in note for note in new["notes"])
        assert any("merged from 2 ranks" in note for note in new["notes"])
        assert new["losses"][:2] == repeated["losses"][:2]
    everything = [sample for new in after for sample in new["seen"]]
    assert len(everything) == 32 + 30 // world * world * 2
    counts = [everything.count(sample) for sample in range(SAMPLES)]
    assert set(counts) <= {1, 2}
    assert sum(counts) == len(everything)


def test_ranks_that_drifted_apart_are_not_saved(tmp_path: Path) -> None:
    url = str(tmp_path / "drifted")
    told = spawn(differ, 2, url)
    assert all("counts: ranks 0 and 1 have different states" in one for one in told)
    with pytest.raises(ucp.NotFoundError):
        ucp.open(url)


def test_the_stored_state_is_plain(saved: Saved) -> None:
    with ucp.open(saved[0]) as ckpt:
        assert set(ckpt.state) == {"lr_scheduler", "loss_scale", "rng", "sampler", "seen", "counts"}
        assert ckpt.state["counts"] == {"steps": 4, "best": 0.5}
        assert ckpt.state["sampler"]["position"] == 32
        assert set(ckpt.state["rng"]["rank"]) == {"0", "1"}
        assert ckpt.state["loss_scale"]["scale"] > 0
