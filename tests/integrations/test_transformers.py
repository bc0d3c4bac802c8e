from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.transformers_jobs import train, without_asking
from tests.support.gloo import spawn


def check_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6)]


def in_order(results: list[Any]) -> list[set[int]]:
    """The samples of each step, over all ranks."""
    size = 6 // len(results)
    seen = [result["seen"] for result in results]
    return [{index for own in seen for index in own[at : at + size]} for at in range(0, len(seen[0]), size)]


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_a_run_goes_on_on_another_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    url = str(tmp_path / "run")
    first = spawn(train, before, url, 6)
    assert {(result["resumed"], result["step"]) for result in first} == {(None, 6)}
    second = spawn(train, after, url, 12)
    truth = spawn(train, 1, str(tmp_path / "truth"), 12)
    assert {(result["resumed"], result["step"], result["lr"]) for result in second} == {(6, 12, truth[0]["lr"])}
    assert in_order(first) + in_order(second) == in_order(truth)
    for result in second:
        assert [step for step, _ in result["logged"]] == list(range(1, 13))
        assert [loss for _, loss in result["logged"]] == pytest.approx(
            [loss for _, loss in truth[0]["logged"]], rel=1e-3
        )
        check_equal(result["state"], truth[0]["state"])
    assert second[0]["saved"][-1] == 12
    assert second[0]["best"].metrics["eval_loss"] > 0
    assert not second[0]["own"], "the Trainer's own saving is off"


@pytest.mark.slow
def test_random_streams_go_on(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    spawn(train, 1, url, 6)
    (second,) = spawn(train, 1, url, 12)
    (truth,) = spawn(train, 1, str(tmp_path / "truth"), 12)
    assert torch.equal(second["rng"], truth["rng"])
    assert all(torch.equal(second["state"][name], truth["state"][name]) for name in truth["state"])


@pytest.mark.slow
def test_a_signal_saves_and_stops_all_ranks(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    results = spawn(train, 2, url, 40, {}, 1)
    (step,) = {result["step"] for result in results}
    assert 5 <= step <= 7
    assert all(result["preempted"] and result["saved"][-1] == step for result in results)


def test_the_callback_must_know_where_the_run_is(tmp_path: Path) -> None:
    assert "ucp_callback.resume(trainer)" in spawn(without_asking, 1, str(tmp_path / "run"))[0]
