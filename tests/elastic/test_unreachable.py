"""What does not answer is not lost: no run goes on from an older version because the newest one was out of reach."""

from __future__ import annotations

import os

import pytest

from tests.elastic.test_run import breaks_off, go, no_launcher, run_of
from tests.support.gloo import RankFailed, spawn
from ucp.elastic import Memory, Run, holdings, keep
from ucp.elastic.nodes import NodesStore
from ucp.elastic.nodes.link import Link
from ucp.errors import CorruptError, NotFoundError, StorageError
from ucp.store import LocalStore

__all__ = ["no_launcher"]


def steps_held(tmp_path):
    return sorted(path.parent.name for path in (tmp_path / "memory").rglob("ucp.json"))


@pytest.fixture
def failing(monkeypatch):
    """Loading raises these, one after the other, and then works."""
    real = holdings.load
    errors = []

    def load(state, source, **options):
        if errors:
            raise errors.pop(0)
        return real(state, source, **options)

    monkeypatch.setattr(holdings, "load", load)
    return errors


def test_a_version_that_is_out_of_reach_for_a_moment_is_taken(tmp_path, failing):
    memory, _ = breaks_off(tmp_path, 3, every=2)
    failing.append(StorageError("it does not answer"))
    with run_of(tmp_path, memory=memory, every=2) as run:
        go(run, 4)
        assert (run.report.step, run.report.tier) == (3, "memory")


def test_one_that_stays_out_of_reach_is_left_for_the_next_start(tmp_path, failing):
    memory, _ = breaks_off(tmp_path, 3, every=2)
    failing += [StorageError("it does not answer")] * 2
    with pytest.raises(StorageError, match="it does not answer"), run_of(tmp_path, memory=memory, every=2) as run:
        go(run, 4)
    assert steps_held(tmp_path) == ["step-00000003"]
    with run_of(tmp_path, memory=memory, every=2) as run:
        go(run, 4)
        assert (run.report.step, run.report.tier) == (3, "memory")


@pytest.mark.parametrize(
    "errors",
    [
        [StorageError("gone"), CorruptError("damaged")],
        [CorruptError("damaged"), StorageError("gone")],
        [StorageError("gone"), CorruptError("damaged"), StorageError("gone")],
    ],
    ids=["then damaged", "after damage", "again"],
)
def test_damage_and_what_does_not_answer_together(tmp_path, failing, errors):
    memory, _ = breaks_off(tmp_path, 3, every=2)
    failing += errors
    last = isinstance(errors[-1], StorageError)
    if last:
        with pytest.raises(StorageError, match="gone"), run_of(tmp_path, memory=memory, every=2) as run:
            go(run, 4)
    assert steps_held(tmp_path) == ["step-00000003"]
    with run_of(tmp_path, memory=memory, every=2) as run:
        go(run, 4)
        assert (run.report.step, run.report.tier) == (3, "memory")


def test_damage_everywhere_is_told_with_the_file(tmp_path):
    memory, _ = breaks_off(tmp_path, 3)
    for shard in (tmp_path / "memory").rglob("rank-*"):
        shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
    told = pytest.raises(
        NotFoundError, match=r"nothing is left to go on from:\n  step 3 .*shards/rank-\S+: bytes .* fail their crc32c\n"
    )
    with told, run_of(tmp_path, memory=memory) as run:
        go(run, 4)


def test_storage_that_does_not_answer_is_not_passed_over(tmp_path, monkeypatch):
    with run_of(tmp_path, every=2) as run:
        go(run, 4)
    refuses, read = [0], LocalStore.read_into

    def read_into(self, path, offset, buffer):
        if refuses[0] and "step-00000004" in f"{self.url}/{path}":
            refuses[0] -= 1
            raise StorageError(f"{self.url}: it does not answer")
        read(self, path, offset, buffer)

    monkeypatch.setattr(LocalStore, "read_into", read_into)
    refuses[0] = 1000
    with pytest.raises(StorageError, match="does not answer"), run_of(tmp_path, every=2) as run:
        go(run, 6)
    assert 0 < refuses[0] < 1000
    refuses[0] = 0
    with run_of(tmp_path, every=2) as run:
        go(run, 6)
        assert run.report.step == 4


def node_of(rank, world, url, root, until, cut):
    """Each rank is a node of its own; for one that is `cut` off, the other one does not answer."""
    os.environ["UCP_NODE"] = f"n{rank}"
    if rank == cut:
        Link._line = lambda self: (_ for _ in ()).throw(StorageError(f"node {self.name} is gone"))
        NodesStore.tend = lambda self, active: setattr(self, "tended", (self.me,))
    memory = Memory(every=2, copies=2, root=root, busy="wait")
    run = Run(url, layouts=keep(), memory=memory, every=3, timeout=60).__enter__()
    go(run, until, of=100)
    run.tiers[0].settle()
    return run.report.step, run.report.tier


def test_a_copy_that_is_damaged_is_not_all_there_is_where_a_node_does_not_answer(tmp_path):
    given = str(tmp_path / "run"), str(tmp_path / "memory")
    assert spawn(node_of, 2, *given, 4, None) == [(0, None)] * 2
    (own,) = (path for path in (tmp_path / "memory").rglob("ucp.json") if "/n0/" in str(path))
    own.write_bytes(b"{}")
    with pytest.raises(RankFailed, match="StorageError: node n1 is gone"):
        spawn(node_of, 2, *given, 5, 0)
    assert steps_held(tmp_path) == ["step-00000004"] * 2
    assert spawn(node_of, 2, *given, 5, None) == [(4, "memory")] * 2
