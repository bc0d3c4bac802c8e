"""DeepSpeed jobs under the real torchrun, whose workers are killed and whose ranks become fewer and more."""

from __future__ import annotations

import importlib.util
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.elastic.frameworks import deepspeed_job as job
from tests.elastic.frameworks.agents import Agents
from tests.support.deepspeed_job import job_environment
from ucp.elastic import Batch, Feed

STEPS = 12
TOLERANCE = 1e-4
"""Of a loss in float32 whose terms are added up in another order, a dozen steps on."""

pytestmark = pytest.mark.slow
more = pytest.mark.exhaustive


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; this test runs its jobs (pip install deepspeed)")
    made = Agents(tmp_path, Path(job.__file__), {**job_environment(), "GLOO_SOCKET_IFNAME": "lo"})
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain() -> dict[int, tuple[float, tuple[int, ...]]]:
    """By step, the loss and the samples of a plain loop: one process, no DeepSpeed, no micro-batches."""
    model = job.build_model()
    optimizer, schedule = job.build_optimizer(model)
    feed = Feed(job.dataset(), Batch(job.SAMPLES, micro=job.SAMPLES), seed=3)
    found = {}
    for step in range(1, STEPS + 1):
        for (given, wanted), _ in feed.step():
            loss = job.mean_loss(model(given), wanted)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found[step] = loss.item(), tuple(sorted(feed.samples))
    return found


def starts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each start that resumed went on from, by epoch."""
    return [one for one in records if "resumed" in one and one["rank"] == 0]


def check(records: Sequence[Mapping[str, Any]], plain: Mapping[int, tuple[float, tuple[int, ...]]]) -> None:
    """The history that the last state descends from has every step's loss and samples, once."""
    for step, (loss, samples) in plain.items():
        done = [one for one in records if one.get("step") == step]
        last = [one for one in done if one["epoch"] == max(one["epoch"] for one in done)]
        assert sum(one["loss"] for one in last) == pytest.approx(loss, rel=TOLERANCE), step
        assert tuple(sorted(number for one in last for number in one["samples"])) == samples, step
        assert {one["global_samples"] for one in last} == {step * job.SAMPLES}, step
    for start in starts(records):
        assert start["global_steps"] == start["resumed"]


def held(agents: Agents, step: int, nodes: int = 1) -> bool:
    """Whether the memory of so many nodes has a step, complete."""
    return len([*(agents.folder / "nodes").glob(f"ucp-*/*/*/e*/step-{step:08}/ucp.json")]) >= nodes


@pytest.mark.parametrize(
    ("stage", "ranks"), [pytest.param(1, 2, marks=more), pytest.param(2, 2, marks=more), (3, 3)], ids=["z1", "z2", "z3"]
)
def test_killed_workers_cost_the_steps_since_the_last_save(
    agents: Agents, plain: dict[int, Any], stage: int, ranks: int
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    print(f"seed {seed}")
    step = chance.randrange(5, 10)
    at = chance.choice(["forward", "backward", "step", "save"])
    kills = [
        {"epoch": 1, "rank": chance.randrange(ranks), "step": step, "at": at},
        {"epoch": 2, "rank": chance.randrange(ranks), "step": 0, "at": "resume"},
    ]
    agents.start("a", ranks, {"stage": stage, "steps": STEPS, "every": 100, "memory": 2, "orders": kills})
    assert agents.wait() == 0, agents.log()[-5000:]
    records = agents.records()
    check(records, plain)
    first, last = [one for one in starts(records) if one["epoch"] != 2]
    assert (first["epoch"], first["resumed"], last["epoch"], last["tier"]) == (1, 0, 3, "memory"), kills
    # The newest save may have been under way.
    assert step - 4 <= last["resumed"] <= step
    assert [*(agents.folder / "nodes").glob("ucp-*/*/*")] == []


def test_the_job_goes_on_with_fewer_and_more_ranks_and_other_stages(agents: Agents, plain: dict[int, Any]) -> None:
    """From memory, and, once that is lost, from storage."""
    order = {"steps": STEPS, "every": 4, "memory": 2}
    for stage, ranks, waits in [(3, 4, 4), (1, 2, 6)]:
        agents.start("a", ranks, {**order, "stage": stage, "waits": waits})
        agents.until(lambda waits=waits: held(agents, waits))
        agents.until((agents.folder / "run" / "step-00000004" / "ucp.json").exists)
        agents.kill("a")
    shutil.rmtree(agents.folder / "nodes")
    agents.start("a", 3, {**order, "stage": 2})
    assert agents.wait() == 0, agents.log()[-5000:]
    records = agents.records()
    check(records, plain)
    found = [(one["epoch"], one["ranks"], one["resumed"], one["tier"]) for one in starts(records)]
    assert found == [(1, 4, 0, None), (2, 2, 4, "memory"), (3, 3, 4, "storage")]


@more
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_is_resharded_from_memory(agents: Agents, plain: dict[int, Any], stage: int) -> None:
    order = {"stage": stage, "steps": STEPS, "every": 100, "memory": 2}
    for ranks, waits in [(4, 4), (2, 8)]:
        agents.start("a", ranks, {**order, "waits": waits})
        agents.until(lambda waits=waits: held(agents, waits))
        agents.kill("a")
    agents.start("a", 3, order)
    assert agents.wait() == 0, agents.log()[-5000:]
    records = agents.records()
    check(records, plain)
    found = [(one["epoch"], one["ranks"], one["resumed"], one["tier"]) for one in starts(records)]
    assert found == [(1, 4, 0, None), (2, 2, 4, "memory"), (3, 3, 8, "memory")]


@more
def test_a_lost_node_comes_from_its_buddys_memory(agents: Agents, plain: dict[int, Any]) -> None:
    """Two torchrun agents; one ends with all it held, and torchrun goes on with the other."""
    order = {"stage": 2, "steps": STEPS, "every": 100, "memory": 2, "waits": 6, "timeout": 20}
    agents.start("a", 2, {**order, "waits_in": 1}, nodes="1:2")
    agents.start("b", 1, {**order, "waits_in": 1}, nodes="1:2")
    agents.until(lambda: held(agents, 6, nodes=2))
    agents.kill("b")
    (lost,) = (agents.folder / "nodes").glob("ucp-*/*/b")
    shutil.rmtree(lost)
    assert agents.wait("a") == 0, agents.log()[-5000:]
    records = agents.records()
    check(records, plain)
    last = starts(records)[-1]
    assert (last["ranks"], last["resumed"], last["tier"]) == (2, 6, "memory")


@more
def test_ranks_that_a_layout_leaves_over_have_no_engine(agents: Agents, plain: dict[int, Any]) -> None:
    """DeepSpeed itself takes a lone rank of ZeRO-3 for a mistake where the launcher has started more."""
    kill = {"epoch": 1, "rank": 0, "step": 5, "at": "backward"}
    order = {"stage": 3, "steps": STEPS, "every": 100, "memory": 2, "orders": [kill]}
    agents.start("a", 2, {**order, "layouts": {"1": {"dp": 1}}})
    assert agents.wait() == 0, agents.log()[-5000:]
    records = agents.records()
    check(records, plain)
    assert {(one["epoch"], one["rank"]) for one in records if one.get("spare")} >= {(2, 1)}
    assert starts(records)[-1]["tier"] == "memory"
