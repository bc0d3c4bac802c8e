from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.gloo import spawn
from tests.train.manager.jobs import (
    build,
    differing,
    failing_save,
    fingerprint,
    go_on,
    outcome,
    preempted,
    run,
    uninterrupted,
)
from ucp.train.manager import CheckpointManager


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.mark.parametrize(
    "sharded", [pytest.param(False, marks=pytest.mark.slow, id="plain"), pytest.param(True, id="fsdp2")]
)
def test_a_signal_to_one_rank_makes_all_save_the_same_step(url: str, sharded: bool) -> None:
    results = spawn(preempted, 3, url, 1, sharded)
    steps = {step for step, *_ in results}
    assert len(steps) == 1
    (step,) = steps
    assert 5 <= step <= 7
    assert all(begun == [False] * (step - 1) + [True] and done for _, begun, done, _ in results)
    model, optimizer = build(seed=5)
    with CheckpointManager(url) as manager:
        resumed = manager.resume((model, optimizer))
    assert resumed is not None
    assert resumed.step == step
    assert not differing(fingerprint(model, optimizer), results[0][3])


@pytest.mark.slow
def test_a_run_goes_on_on_other_numbers_of_ranks_as_if_uninterrupted(url: str) -> None:
    steps, before = 0, None
    for world in (2, 3, 1):
        options: dict[str, Any] = {"every": 2, "keep_latest": 2}
        results = spawn(go_on, world, url, steps + 4, True, options)
        assert {first for first, *_ in results} == {steps}
        steps += 4
        before = results[0][2]
        assert not [differing(before, state) for _, _, state in results if differing(before, state)]
    assert [saved.step for saved in CheckpointManager(url).saved] == [10, 12]
    truth = spawn(_truth, 1, 12)[0]
    assert before is not None
    assert all(before[name].allclose(truth[name], rtol=1e-5, atol=1e-6) for name in truth)


def _truth(rank: int, world: int, steps: int) -> Any:
    return uninterrupted(steps, sharded=True)


@pytest.mark.slow
def test_damage_that_one_rank_sees_is_raised_on_all(url: str) -> None:
    run(url, 4, every=2)
    results = spawn(outcome, 2, url, {}, 1)
    assert all(kind == "CorruptError" and "read wrongly here" in said for kind, said, _ in results)
    assert all("damaged='older'" in hint for *_, hint in results)


def test_damage_that_one_rank_sees_makes_all_take_the_one_before(url: str) -> None:
    run(url, 4, every=2)
    results = spawn(outcome, 2, url, {"damaged": "older"}, 1)
    truth = uninterrupted(2)
    assert all(step == 2 and not differing(state, truth) for step, _, state in results)


def test_a_failed_save_raises_on_all_ranks_at_one_step_or_is_told(url: str) -> None:
    raised = spawn(failing_save, 2, url, "raise")
    assert len({step for step, _ in raised}) == 1
    assert raised[0][0] > 4
    assert all("no room" in said for _, said in raised)
    told = spawn(failing_save, 2, f"{url}2", "warn")
    assert [step for step, _ in told] == [9, 9]
    assert [saved.step for saved in CheckpointManager(url).saved] == [2]
    assert [saved.step for saved in CheckpointManager(f"{url}2").saved] == [2, 6, 8]
