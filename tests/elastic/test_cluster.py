"""The cluster of the elastic demo, with a job that knows nothing of ucp: what is killed is killed, nothing is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.elastic.test_ledger import Life, job
from ucp.demo.elastic import phases, warden
from ucp.demo.elastic.campaign import Campaign, account_of, undisturbed
from ucp.demo.elastic.cluster import Cluster
from ucp.demo.elastic.killer import Blow, Killer, blows
from ucp.demo.elastic.ledger import Strike, account
from ucp.demo.elastic.network import can_divide
from ucp.demo.elastic.phases import Orders, Phases
from ucp.demo.elastic.progress import Progress
from ucp.elastic.nodes.folder import folder_of
from ucp.errors import UcpError, UsageError

JOB = str(Path(__file__).parent / "simple_job.py")
ENDLESS = "1000000"
PATIENCE = 300.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nodes end with their cluster by what /proc tells")


def left(mark: str) -> list[warden.Running]:
    return warden.running(mark)


def until(done: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    limit = time.monotonic() + seconds
    while not done() and time.monotonic() < limit:
        time.sleep(0.02)
    return done()


SLEEPER = """
import os, sys, time
from pathlib import Path
from ucp.demo.elastic.cluster import Cluster, SHARED_MEMORY
from ucp.elastic.nodes.folder import folder_of
folder = Path(sys.argv[1])
with Cluster(folder, [sys.argv[2]], nodes={"a": 2, "ab": 1}, divided=sys.argv[3] == "yes") as cluster:
    for name in ("a", "ab"):
        cluster.start(name)
    folder_of(SHARED_MEMORY, cluster.id, "a")
    cluster.wait(lambda: len(cluster.ranks("a")) == 2 and len(cluster.ranks("ab")) == 1, seconds=300, what="ranks")
    print(cluster.id, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def sleeping(tmp_path: Path) -> Path:
    script = tmp_path / "sleep.py"
    script.write_text("import time\ntime.sleep(600)\n")
    return script


@pytest.mark.slow
@pytest.mark.parametrize("divided", ["no", "yes"])
def test_nothing_is_left_when_the_harness_is_killed(tmp_path: Path, sleeping: Path, divided: str) -> None:
    if divided == "yes" and not can_divide():
        pytest.skip("no network namespaces here")
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path), str(sleeping), divided], stdout=subprocess.PIPE, text=True
    ) as harness:
        assert harness.stdout is not None
        name = harness.stdout.readline().strip()
        assert len(left(name)) == 5
        harness.kill()
    memory = Path("/dev/shm", f"ucp-{os.getuid()}", name)
    assert until(lambda: not left(name) and not memory.exists())
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=False) if divided == "yes" else None
    assert spaces is None or until(lambda: name[:6] not in _namespaces())


def _namespaces() -> str:
    return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
def test_what_is_killed_is_gone_and_nothing_else(tmp_path: Path, sleeping: Path) -> None:
    with Cluster(tmp_path, [str(sleeping)], nodes={"a": 2, "ab": 1}, least=1) as cluster:
        for name in ("a", "ab"):
            cluster.start(name)
        cluster.wait(
            lambda: len(cluster.ranks("a")) == 2 and len(cluster.ranks("ab")) == 1, seconds=PATIENCE, what="ranks"
        )
        with pytest.raises(UsageError, match="runs already"):
            cluster.start("a")
        with pytest.raises(UsageError, match="share a network"):
            cluster.cut("a")
        (other,) = cluster.ranks("ab").values()
        assert cluster.kill_agent("ab")
        assert not cluster.kill_agent("ab")
        assert cluster.ranks("ab") == {0: other}
        assert cluster.present == ("a",)
        memory = [Path(folder_of("/dev/shm", cluster.id, name)) for name in ("a", "ab")]
        assert cluster.kill_node("a") == 3
        assert [folder.exists() for folder in memory] == [False, True]
        assert cluster.ranks("ab") == {0: other}
        cluster.start("ab")
        cluster.wait(lambda: len(cluster.ranks("ab")) == 1, seconds=PATIENCE, what="ranks")
        assert other not in cluster.ranks("ab").values()
    assert not left(cluster.id)
    assert not memory[1].exists()
    cluster.close()


def test_waiting_has_an_end_that_tells_what_was_said(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text("raise SystemExit('no state anywhere')\n")
    with Cluster(tmp_path, [str(script)], nodes={"a": 1}) as cluster:
        cluster.start("a")
        cluster.wait(lambda: "no state anywhere" in cluster.last_words(), seconds=PATIENCE, what="its end")
        with pytest.raises(UcpError, match="the moon: not within") as failure:
            cluster.wait(lambda: False, seconds=0.1, what="the moon")
    assert "no state anywhere" in str(failure.value)


def test_processes_are_found_by_ps_as_by_proc() -> None:
    mark = f"test-{os.getpid()}-{random.getrandbits(32)}/"
    environment = {**os.environ, warden.MARK: f"{mark}n/", "LOCAL_RANK": "3"}
    with subprocess.Popen(["sleep", "100"], env=environment) as process:
        wanted = [warden.Running(process.pid, os.getpid(), "n", 3)]
        try:
            assert until(lambda: warden.running(mark) == wanted)
            try:
                seen = warden._by_ps(f"{warden.MARK}={mark}")
            except FileNotFoundError:
                seen = wanted
            assert seen == wanted
            assert warden.kill_all(mark) == 1
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not left(mark)


STOPPER = """
import sys
from pathlib import Path
from ucp.demo.elastic.phases import Phases
phases = Phases(Path(sys.argv[1]), "a-0.rank")
for phase in ("forward", "optimizer", "forward", "optimizer"):
    print(phase, flush=True)
    phases.reach(phase)
"""


def test_an_order_stops_a_process_exactly_at_its_phase(tmp_path: Path) -> None:
    orders = Orders(tmp_path)
    orders.give("a", 0, phases.OPTIMIZER)
    with subprocess.Popen([sys.executable, "-c", STOPPER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert until(lambda: orders.reached("a", 0) == process.pid)
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            os.kill(process.pid, signal.SIGCONT)
            told, _ = process.communicate()
        finally:
            process.kill()
    assert (told.split(), process.returncode) == (["forward", "optimizer", "forward", "optimizer"], 0)
    orders.withdraw("a", 0)
    assert orders.reached("a", 0) is None


def test_a_job_is_held_up_from_a_step_on_until_it_begins_anew_or_is_released(tmp_path: Path) -> None:
    orders, job = Orders(tmp_path), Phases(tmp_path, "a-0.rank")
    orders.hold(epoch=2, step=7, but=4)
    passed = []

    def train() -> None:
        for epoch, step, world in ((1, 7, 2), (3, 8, 2), (2, 8, 4), (2, 8, 2)):
            job.wait(epoch, step, world)
            passed.append((epoch, step, world))

    thread = threading.Thread(target=train)
    thread.start()
    assert until(lambda: len(passed) == 3)
    thread.join(0.2)
    assert (thread.is_alive(), passed) == (True, [(1, 7, 2), (3, 8, 2), (2, 8, 4)])
    orders.release()
    thread.join(PATIENCE)
    assert passed[3:] == [(2, 8, 2)]


def test_without_orders_a_phase_is_passed(tmp_path: Path) -> None:
    Phases(None, "a-0.rank").reach("forward")
    Phases(tmp_path, "a-0.rank").reach("forward")
    Orders(tmp_path).give("a", 0, "optimizer")
    Phases(tmp_path, "a-0.rank").reach("forward")
    Phases(tmp_path, "b-0.rank").reach("optimizer")
    assert Orders(tmp_path).reached("a", 0) is None


def test_a_job_that_does_no_more_steps_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with Cluster(tmp_path, ["never.py"], nodes={"a": 1}) as cluster:
        killer = Killer(cluster, Progress(tmp_path), rng=random.Random(1), patience=0.1)
        killer.reach(0)
        with pytest.raises(UcpError, match=r"a step after 0, or the end of the job: not within 0\.1 s"):
            killer.reach(1)
        with pytest.raises(UcpError, match="the end of the job: not within"):
            killer.finish()


def test_what_did_not_come_about_on_a_course_is_told() -> None:
    course = Campaign(nodes={"a": 2, "b": 1}, course=[("a", "b"), ("a",)], kills=2, until=8, seed=1)
    records = job([Life(3, 1, 0, 4)], 8)
    two = account(records, job([], 8), [Strike(time=1.0, what=what, node="a") for what in ("rank", "node", "cut")])
    assert (two.worlds, course.missed(two, tier="memory"), course.missed(two, tier="local")) == (
        (3, 2),
        (),
        ("no recovery from local",),
    )
    none = account(job([], 8), job([], 8))
    assert course.missed(none, tier="memory") == ("0 kills of 2", "no step on 3 ranks", "no recovery from memory")


def test_every_phase_and_every_kind_of_blow_comes() -> None:
    coming = blows(random.Random(1), divided=True)
    drawn = [next(coming) for _ in range(200)]
    assert {blow.phase for blow in drawn} == {*phases.PHASES, None}
    assert {blow.what for blow in drawn} == {"rank", "node", "agent", "cut"}
    assert "cut" not in {blow.what for blow, _ in zip(blows(random.Random(1), divided=False), range(100), strict=False)}


def campaign(folder: Path, *words: str, kills: int, seed: int) -> None:
    command = [JOB, "300", *words]
    undisturbed(folder / "alone", [JOB, "300", "fast"])
    Campaign(
        nodes={"a": 2, "b": 1},
        course=[("a", "b"), ("a",), ("a", "b")],
        kills=kills,
        until=200,
        seed=seed,
        phases=("start", "recovery", "forward", "optimizer"),
        patience=PATIENCE,
    ).run(folder / "job", command)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_job_that_keeps_its_state_loses_nothing(tmp_path: Path) -> None:
    campaign(tmp_path, kills=4, seed=1)
    found = account_of(tmp_path / "job", tmp_path / "alone")
    assert found.broken(tolerance=1e-12, seconds=PATIENCE) == ()
    assert found.kills >= 4
    assert set(found.worlds) == {2, 3}
    assert all(recovery.seconds > 0 for recovery in found.recoveries)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_job_that_leaves_out_samples_is_found_out(tmp_path: Path) -> None:
    campaign(tmp_path, "skip", kills=1, seed=2)
    found = account_of(tmp_path / "job", tmp_path / "alone")
    assert found.samples_missing >= 1
    assert found.broken(tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_node_that_is_cut_off_is_done_without_and_taken_back(tmp_path: Path) -> None:
    if not can_divide():
        pytest.skip("no network namespaces here")
    progress = Progress(tmp_path)
    with Cluster(tmp_path, [JOB, ENDLESS], nodes={"a": 1, "b": 1, "c": 1}, divided=True) as cluster:
        killer = Killer(cluster, progress, rng=random.Random(3), patience=PATIENCE)
        killer.move(("a", "b", "c"))
        assert progress.world == 3
        before = progress.epoch
        killer.strike(Blow(what="cut"))
        assert len(cluster.cut_off) == 1
        killer.settle()
        assert cluster.cut_off == ()
        assert (progress.world, progress.epoch >= before + 2) == (3, True)
    assert cluster.id[:6] not in _namespaces()
