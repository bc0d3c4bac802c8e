"""Megatron-Core under real torchrun: ranks are killed, nodes are lost, and training goes on as if nothing had been."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import blocks
from tests.elastic.frameworks.agents import Agents
from tests.support.deepspeed_job import job_environment

JOB = Path(__file__).with_name("megatron_job.py")
PAGE = Path(__file__).parents[3] / "docs" / "megatron.md"
STEPS = 8

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def installed() -> None:
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; these tests train with it (pip install megatron-core)")


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    made = started(tmp_path)
    yield made
    made.close()


def started(folder: Path, script: Path = JOB) -> Agents:
    return Agents(folder, script, {**job_environment(), "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"})


def undisturbed(folder: Path, ranks: int, order: dict[str, Any]) -> dict[int, tuple[float, list[int]]]:
    """What each step is in a run in which nothing happens."""
    folder.mkdir()
    agents = started(folder)
    try:
        agents.start("a", ranks, order)
        assert agents.wait() == 0, agents.log()[-5000:]
        return steps(agents.records())
    finally:
        agents.close()


def steps(records: list[dict[str, Any]]) -> dict[int, tuple[float, list[int]]]:
    """By step: the loss of all ranks together, and the samples of all, once each; of the last start that did it."""
    found: dict[int, tuple[float, list[int]]] = {}
    for number in {one["step"] for one in records if "step" in one}:
        did = [one for one in records if one.get("step") == number]
        last = [one for one in did if one["epoch"] == max(one["epoch"] for one in did)]
        seats = {tuple(one["seat"]): one["samples"] for one in last}
        assert all(one["samples"] == seats[tuple(one["seat"])] for one in last), "ranks of a model have other samples"
        assert len(seats) == last[0]["seat"][1]
        found[number] = sum(one["loss"] for one in last), [sample for seat in sorted(seats) for sample in seats[seat]]
    return found


def check_history(agents: Agents, wanted: dict[int, tuple[float, list[int]]], *, rel: float) -> None:
    """All steps were done, on the samples that they were to be done on, and came to the same losses."""
    found = steps(agents.records())
    assert sorted(found) == sorted(wanted) == list(range(1, STEPS + 1))
    for number, (loss, samples) in wanted.items():
        assert found[number][1] == samples
        assert found[number][0] == pytest.approx(loss, rel=rel), number
    assert wanted[STEPS][0] < 0.97 * wanted[1][0]


def test_killed_ranks_cost_steps_and_nothing_else(agents: Agents, tmp_path: Path) -> None:
    """One dies in a tensor-parallel collective's face, another when all recover. Dropout tells random streams apart."""
    order = {"steps": STEPS, "layouts": {"4": {"dp": 2, "tp": 2}}, "dropout": 0.1, "memory": 2}
    kills = [
        {"epoch": 1, "rank": 1, "step": 6, "at": "forward"},
        {"epoch": 2, "rank": 3, "step": 0, "at": "resume"},
    ]
    agents.start("a", 4, {**order, "orders": kills})
    assert agents.wait() == 0, agents.log()[-5000:]
    last = [one for one in agents.records() if "resumed" in one and one["epoch"] == 3]
    assert [(one["tier"], one["changed"]) for one in last] == [("memory", False)] * 4
    assert {one["resumed"] for one in last} <= {2, 4}
    check_history(agents, undisturbed(tmp_path / "undisturbed", 4, order), rel=1e-6)


def test_a_job_goes_on_in_other_layouts(agents: Agents, tmp_path: Path) -> None:
    """A node is lost and another one comes; dp2 tp2 becomes pp2 and then dp3, each out of the nodes' memory."""
    layouts = {"4": {"dp": 2, "tp": 2}, "3": {"dp": 3}, "2": {"pp": 2}}
    order = {"steps": STEPS, "layouts": layouts, "memory": 2, "timeout": 30, "waits": {"1": 3, "2": 5}}
    agents.start("a", 2, order, nodes="1:2")
    agents.start("b", 2, order, nodes="1:2")
    agents.until(lambda: held(agents, 1, 2) == 2)
    agents.kill("b")
    agents.until(lambda: held(agents, 2, 4) == 1)
    agents.start("c", 1, order, nodes="1:2")
    assert agents.wait("a") == 0, agents.log()[-5000:]
    starts = {one["epoch"]: one for one in agents.records() if "resumed" in one}
    told = [(one["mesh"], one["resumed"], one["tier"], one["changed"]) for one in starts.values()]
    assert told == [
        ({"dp": 2, "tp": 2}, 0, None, None),
        ({"pp": 2}, 2, "memory", True),
        ({"dp": 3}, 4, "memory", True),
    ]
    alone = {"steps": STEPS, "layouts": {"1": {"dp": 1}}}
    check_history(agents, undisturbed(tmp_path / "undisturbed", 1, alone), rel=1e-4)


def held(agents: Agents, epoch: int, step: int) -> int:
    """Nodes that have all of a version in memory."""
    return len([*agents.folder.glob(f"nodes/ucp-*/*/*/e{epoch:05}/step-{step:08}/ucp.json")])


def test_the_script_of_the_page_is_killed_and_goes_on(tmp_path: Path) -> None:
    (script,) = [block.text for block in blocks(PAGE) if block.text.startswith("# file: pretrain.py")]
    (tmp_path / "pretrain.py").write_text(script)
    agents = started(tmp_path, JOB.with_name("megatron_page.py"))
    try:
        agents.start("a", 2, {"script": "pretrain.py", "folder": str(tmp_path), "kill": [1, 1, 13]})
        assert agents.wait() == 0, agents.log()[-5000:]
    finally:
        agents.close()
    last = [one for one in agents.records() if one["epoch"] == 2]
    assert {(one["tier"], one["mesh"]["tp"]) for one in last} == {("memory", 2)}
    assert {one["position"] - 12 * one["step"] for one in last} == {0}
    assert max(one["step"] for one in last) == 20


@pytest.mark.exhaustive
def test_a_rank_that_hangs_keeps_nobody_waiting(agents: Agents) -> None:
    """It is stopped where the others wait for it in a collective; one of the three ranks is spare."""
    order = {"steps": STEPS, "layouts": {"2": {"tp": 2}}, "memory": 2, "timeout": 20}
    agents.start("a", 3, {**order, "orders": [{"epoch": 1, "rank": 1, "step": 4, "at": "forward", "how": "stop"}]})
    assert agents.wait() == 0, agents.log()[-5000:]
    last = [one for one in agents.records() if one["epoch"] == 2]
    assert {one["tier"] for one in last if "resumed" in one} == {"memory"}
    assert [one["rank"] for one in last if one.get("spare")] == [2]
    # Whichever is first: the group of the collective, or the watch.
    assert re.search("Timed out waiting 20000ms|was not heard of for 20 s", agents.log())
