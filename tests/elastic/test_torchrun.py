"""Runs under the real torchrun, whose workers are lost: it starts them anew, and they go on where they were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.support.descendants import descendants
from tests.support.gloo import die_with_parent

JOB = Path(__file__).with_name("torchrun_job.py")
ROOT = Path(__file__).parents[2]
PATIENCE = 400

pytestmark = pytest.mark.slow
exhaustive = pytest.mark.exhaustive
"""Of what these show, one test of each kind is left to CI."""


class Agents:
    """torchrun agents of one job, each a node of its own; none outlives the test, nor do their workers."""

    def __init__(self, folder):
        self.folder, self.id = folder, uuid.uuid4().hex[:8]
        self.out = folder / "out"
        self.out.mkdir()
        self.running = {}
        # Where agents meet, which is on no node that may be lost.
        self.meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self, name, ranks, order, *, nodes="1", restarts=3):
        order = {"url": str(self.folder / "run"), "out": str(self.out), "root": str(self.folder), "orders": [], **order}
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", f"--rdzv-id={self.id}"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.meeting.port}"]
        # Agents that are to meet may begin to look for each other long after one another.
        last_call = 1 if nodes == "1" else 15
        timing = f"join_timeout=600,last_call_timeout={last_call},keep_alive_interval=1,keep_alive_max_attempt=8"
        command += [f"--rdzv-conf=is_host=0,{timing}"]
        environment = {
            **os.environ,
            "UCP_NODE": name,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            # Else an agent that was not the first one knows for ever only the store of the one that was
            # (torch/distributed/elastic/rendezvous/dynamic_rendezvous.py, `_bootstrap_store_info`).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(nodes != "1")),
        }
        log = open(self.folder / f"{name}.log", "a")  # noqa: SIM115  of the process, which it outlives
        self.running[name] = subprocess.Popen(
            [*command, str(JOB), json.dumps(order)],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509  it calls prctl alone
        )
        log.close()

    def wait(self, name="a"):
        return self.running[name].wait(timeout=PATIENCE)

    def saw(self):
        """What the ranks that ended well saw, by rank."""
        found = [json.loads(path.read_text()) for path in self.out.iterdir()]
        return sorted(found, key=lambda one: one["rank"])

    def log(self, name="a"):
        return (self.folder / f"{name}.log").read_text()

    def close(self):
        for process in self.running.values():
            for pid in [process.pid, *descendants(process.pid)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()


@pytest.fixture
def agents(tmp_path):
    made = Agents(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses of a run in which nothing happens, by step."""
    made = Agents(tmp_path_factory.mktemp("undisturbed"))
    try:
        made.start("a", 1, {"kind": "ddp", "steps": 12, "every": 100})
        assert made.wait() == 0, made.log()
        return losses(made.saw())
    finally:
        made.close()


def losses(saw):
    """By step: those of all ranks together, which each have their part, or the same as others."""
    total = {}
    for one in saw:
        for step, loss in one["steps"].items():
            total[int(step)] = total.get(int(step), 0.0) + loss / shared_by(one)
    return total


def agree(saw, undisturbed, steps):
    """The steps that were done are `steps`, and their losses are those of a run in which nothing happened."""
    found = losses(saw)
    assert sorted(found) == list(steps)
    for step, loss in found.items():
        assert loss == pytest.approx(undisturbed[step], rel=1e-9), step


def shared_by(one):
    return one["mesh"].get("tp", 1)


@exhaustive
def test_a_killed_rank_costs_what_was_not_saved_and_nothing_else(agents, undisturbed):
    kind, ranks = "fsdp", 3
    kill = {"epoch": 1, "step": 9, "rank": 1, "at": "step", "how": "kill"}
    agents.start("a", ranks, {"kind": kind, "steps": 12, "every": 4, "orders": [kill]})
    assert agents.wait() == 0, agents.log()
    saw = agents.saw()
    assert [one["epoch"] for one in saw] == [2] * ranks
    (resumed,) = {one["resumed"] for one in saw}
    assert resumed in (4, 8)  # step 8 was being saved
    assert saw[0]["report"]["steps_lost"] in (8 - resumed, 9 - resumed)  # others may have done step 9
    agree(saw, undisturbed, range(resumed + 1, 13))
    records = sorted((agents.folder / "run" / "elastic").glob("timeline-*.json"))
    assert [json.loads(path.read_text())["epoch"] for path in records] == [1, 2]


@exhaustive
@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_rank_that_fails_while_all_save_takes_nobody_into_a_hang(agents, undisturbed, how):
    fail = {"epoch": 1, "step": 5, "rank": 2, "at": "save", "how": how}
    agents.start("a", 3, {"kind": "fsdp", "steps": 12, "every": 1, "orders": [fail]})
    assert agents.wait() == 0, agents.log()
    saw = agents.saw()
    assert {one["epoch"] for one in saw} == {2}
    (resumed,) = {one["resumed"] for one in saw}
    assert resumed in (4, 5)
    agree(saw, undisturbed, range(resumed + 1, 13))
    if how == "raise":
        assert "ValueError: told to fail" in agents.log()


@exhaustive
def test_spare_ranks_wait_and_leave_with_the_others(agents, undisturbed):
    kill = {"epoch": 1, "step": 6, "rank": 0, "at": "step", "how": "kill"}
    agents.start("a", 3, {"kind": "tp", "steps": 12, "every": 4, "orders": [kill]})
    assert agents.wait() == 0, agents.log()
    saw = agents.saw()
    assert [(one["epoch"], one["spare"], one["mesh"]) for one in saw] == [
        (2, False, {"dp": 1, "tp": 2}),
        (2, False, {"dp": 1, "tp": 2}),
        (2, True, {"dp": 1, "tp": 2}),
    ]
    (resumed,) = {one["resumed"] for one in saw if not one["spare"]}
    agree(saw, undisturbed, range(resumed + 1, 13))


def test_what_cannot_be_survived_ends_with_the_reason(agents):
    agents.start("a", 1, {"kind": "tp", "steps": 12, "every": 4}, restarts=0)
    assert agents.wait() == 1
    assert "UsageError: no layout fits 1 rank:\n" in agents.log()
    assert "dp1 tp2: takes 2 ranks" in agents.log()


def until_saved(agents, step):
    """Wait until the checkpoint of a step is complete."""
    root = agents.folder / "run" / f"step-{step:08}" / "ucp.json"
    for _ in range(20 * PATIENCE):
        if root.exists():
            return
        for name, process in agents.running.items():
            assert process.poll() is None, agents.log(name)
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {agents.log()}")


@exhaustive
@pytest.mark.parametrize("whole", [True, False], ids=["node", "agent"])
def test_a_lost_node_leaves_the_others_at_work(agents, undisturbed, whole):
    order = {"kind": "fsdp", "steps": 12, "every": 4, "waits": 6, "timeout": 30}
    agents.start("a", 2, order, nodes="1:2")
    agents.start("b", 1, order, nodes="1:2")
    until_saved(agents, 4)
    workers = descendants(agents.running["b"].pid)
    for pid in [agents.running["b"].pid, *(workers if whole else ())]:
        os.kill(pid, signal.SIGKILL)
    assert agents.wait("a") == 0, agents.log()
    saw = agents.saw()
    assert [(one["node"], one["world"], one["resumed"]) for one in saw] == [("a", 2, 4)] * 2
    agree(saw, undisturbed, range(5, 13))
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def until_held(agents, root, step):
    """Wait until a tier of the nodes holds a step, complete and on both of them."""
    for _ in range(20 * PATIENCE):
        if len([*agents.folder.glob(f"{root}/ucp-*/*/*/e00001/step-{step:08}/ucp.json")]) == 2:
            return
        for name, process in agents.running.items():
            assert process.poll() is None, agents.log(name)
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {agents.log()}")


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=exhaustive), "fsdp", pytest.param("tp", marks=exhaustive)])
def test_a_killed_rank_is_recovered_from_memory(agents, undisturbed, kind):
    ranks = 4 if kind == "tp" else 3
    kill = {"epoch": 1, "step": 9, "rank": 1, "at": "step", "how": "kill"}
    agents.start("a", ranks, {"kind": kind, "steps": 12, "every": 100, "memory": 2, "orders": [kill]})
    assert agents.wait() == 0, agents.log()
    saw = agents.saw()
    assert {(one["epoch"], one["tier"]) for one in saw} == {(2, "memory")}
    (resumed,) = {one["resumed"] for one in saw}
    assert resumed in (6, 8)  # step 8 was being saved
    agree(saw, undisturbed, range(resumed + 1, 13))
    assert saw[0]["report"]["parts"].keys() >= {"detect", "rendezvous", "start", "agree", "build", "read", "resume"}
    assert list((agents.folder / "memory").iterdir()) == []


@pytest.mark.parametrize("tier", ["memory", pytest.param("local", marks=exhaustive)])
def test_a_lost_node_is_recovered_from_its_buddys_copies(agents, undisturbed, tier):
    order = {"kind": "fsdp", "steps": 12, "every": 100, tier: 2, "waits": 6, "timeout": 30}
    agents.start("a", 2, order, nodes="1:2")
    agents.start("b", 1, order, nodes="1:2")
    until_held(agents, tier, 6)
    for pid in [agents.running["b"].pid, *descendants(agents.running["b"].pid)]:
        os.kill(pid, signal.SIGKILL)
    (lost,) = (agents.folder / tier).glob("ucp-*/*/b")
    shutil.rmtree(lost)
    Path(f"{lost}.lock").unlink(missing_ok=True)
    assert agents.wait("a") == 0, agents.log()
    saw = agents.saw()
    assert [(one["node"], one["world"], one["resumed"], one["tier"]) for one in saw] == [("a", 2, 6, tier)] * 2
    agree(saw, undisturbed, range(7, 13))
    assert list((agents.folder / tier).iterdir()) == []
