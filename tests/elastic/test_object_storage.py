"""A run whose checkpoints are in an object store, on nodes that are lost with all that they hold."""

from __future__ import annotations

import json
import uuid

import pytest

from tests.elastic.test_torchrun import Agents, agents, agree, undisturbed
from ucp.store import open_store

__all__ = ["agents", "undisturbed"]

pytestmark = pytest.mark.slow


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.exhaustive)])
def url(request, served, monkeypatch):
    """A prefix of its own in a real server's bucket."""
    endpoint = served(request.param)
    for name, value in endpoint.environment().items():
        monkeypatch.setenv(name, value)
    return f"{endpoint.url(uuid.uuid4().hex)}/run"


def test_a_killed_rank_goes_on_from_the_bucket(agents: Agents, undisturbed, url):
    kill = {"epoch": 1, "step": 9, "rank": 1, "at": "step", "how": "kill"}
    agents.start("a", 2, {"kind": "fsdp", "steps": 12, "every": 4, "orders": [kill], "url": url})
    assert agents.wait() == 0, agents.log()
    saw = agents.saw()
    assert {(one["epoch"], one["tier"]) for one in saw} == {(2, "storage")}
    (resumed,) = {one["resumed"] for one in saw}
    assert resumed in (4, 8)  # step 8 was being saved
    agree(saw, undisturbed, range(resumed + 1, 13))
    store = open_store(url)
    assert store.exists("step-00000012/ucp.json")  # the last step
    starts = [json.loads(store.read(f"elastic/start-{epoch:05}.json")) for epoch in (1, 2)]
    assert [one["nodes"] for one in starts] == [["a"], ["a"]]


def test_all_nodes_are_lost_and_others_come(tmp_path, undisturbed, url):
    """What the bucket has is all that is left; the memory of other nodes knows nothing."""
    order = {"kind": "fsdp", "steps": 12, "every": 4, "memory": 2, "url": url}
    kill = {"epoch": 1, "step": 10, "rank": 0, "at": "step", "how": "kill"}
    for name in ("lost", "new"):
        (tmp_path / name).mkdir()
    lost, new = Agents(tmp_path / "lost"), Agents(tmp_path / "new")
    try:
        lost.start("a", 2, {**order, "orders": [kill]}, restarts=0)
        assert lost.wait("a") != 0
        new.start("b", 3, order)
        assert new.wait("b") == 0, new.log("b")
    finally:
        lost.close()
        new.close()
    saw = new.saw()
    assert {(one["node"], one["tier"], one["world"]) for one in saw} == {("b", "storage", 3)}
    (resumed,) = {one["resumed"] for one in saw}
    assert resumed in (4, 8)
    agree(saw, undisturbed, range(resumed + 1, 13))
    assert saw[0]["report"]["at_least"] is True  # who knew more is gone
    assert not [name for name in open_store(f"{url}/elastic").children() if name.startswith("epoch-")]
