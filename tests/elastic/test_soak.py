"""The real job, struck and moved about: a short time always, a hundred kills where there is all the time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.elastic.soak import COURSE, FIRST, NODES, broken, soak
from ucp.demo.elastic.campaign import Campaign
from ucp.demo.elastic.killer import read_strikes
from ucp.demo.elastic.network import can_divide

PATIENCE = 300.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nodes have their memory in /dev/shm")


@pytest.mark.slow
def test_a_job_that_is_struck_and_laid_out_anew_loses_nothing(tmp_path: Path) -> None:
    """Two ranks of FSDP, and four of FSDP and tensor parallelism when a node comes: what is in memory is resharded."""
    campaign = Campaign(
        nodes={"a": 2, "b": 2},
        course=[("a",), ("a", "b")],
        kills=2,
        until=30,
        seed=3,  # first a rank: of the node that is alone nothing else has copies
        phases=("replication", "optimizer"),
        again=0,
        patience=PATIENCE,
    )
    account, failure = soak(tmp_path, campaign, steps=36, tiers="m", say=print)
    assert not failure
    assert account is not None
    assert broken(account, campaign, read_strikes(tmp_path / "job")) == ()
    assert (account.steps, set(account.worlds)) == (36, {2, 4})
    assert (account.meshes[0], account.meshes[-1]) == ({"dp": 2}, {"dp": 2, "tp": 2})
    grown = [recovery for recovery in account.recoveries if recovery.world > recovery.world_before]
    assert {(recovery.tier, recovery.reconfigured) for recovery in grown} == {("memory", True)}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    campaign = Campaign(
        nodes=NODES,
        course=COURSE,
        kills=100,
        until=870,
        seed=11,
        divided=can_divide(),
        first=FIRST,
        apart=2,
        again=0.4,
        patience=PATIENCE,
    )
    account, failure = soak(tmp_path, campaign, steps=900, tiers="ml", say=print)
    assert not failure
    assert account is not None
    assert broken(account, campaign, read_strikes(tmp_path / "job")) == ()
    assert account.kills >= 100
    assert {8, 7, 6, 4} <= set(account.worlds)
    assert {1, 2} <= {mesh.get("tp", 1) for mesh in account.meshes}
