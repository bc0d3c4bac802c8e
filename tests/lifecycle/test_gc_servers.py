"""Sharing and collecting on real object stores."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import ucp
from tests.servers.endpoint import Endpoint
from tests.share.made import check, source
from tests.train.save import shared_jobs as jobs
from ucp.format.pool import is_name
from ucp.lifecycle.gc import gc
from ucp.mapping import read_source
from ucp.run.claim import HEAD
from ucp.run.verify import verify
from ucp.share.lease import Lease
from ucp.store import open_store

SLOW = ("ceph", "azurite")


@pytest.fixture(params=["moto", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def run(request: pytest.FixtureRequest, served: Callable[[str], Endpoint], monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a folder of its own."""
    endpoint = served(request.param)
    for name, value in endpoint.environment().items():
        monkeypatch.setenv(name, value)
    return endpoint.url(f"runs/{uuid.uuid4()}")


def pool(run: str) -> set[str]:
    return {entry.path for entry in open_store(run).child("shared").entries() if is_name(entry.path)}


def test_converted_collected_and_read(run: str, tmp_path: Path) -> None:
    store = open_store(run)
    for step in (1, 2):
        ucp.convert(source(tmp_path, step), f"{run}/step-{step}", share=True)
        check(f"{run}/step-{step}", step)
    assert len(pool(run)) == 4
    for entry in list(store.entries("step-1/")):
        store.delete(entry.path)
    store.put(f"step-3/{HEAD}", b"{}")
    store.put("step-3/tensors/w/c/0/0", b"left")
    lease = Lease(store.child("shared"), "step-4")
    assert not gc(run, grace=10, clock=lambda: 0.0).removed
    waited = gc(run, grace=10, clock=lambda: 5.0)
    assert (waited.removed, len(waited.condemned)) == ((), 2)
    lease.confirm({name: store.child("shared").entry(name).size for name in pool(run)})
    lease.release()
    kinds = sorted(one.kind for one in gc(run, grace=10, clock=lambda: 20.0).removed)
    assert kinds == ["incomplete", "shared"]
    assert len(pool(run)) == 3
    check(f"{run}/step-2", 2)
    assert verify(*read_source(f"{run}/step-2"), deep=True).ok
    assert gc(run, grace=10, clock=lambda: 40.0).complete == ("step-2",)


def test_saved_loaded_and_kept(run: str) -> None:
    model, optimizer = jobs.adapted()
    with ucp.CheckpointManager(run, keep_latest=2, share=True, grace=60, preempt=()) as manager:
        for step in range(1, 4):
            jobs.train(model, optimizer, step)
            manager.save(step, (model, optimizer)).result()
    assert [saved.step for saved in manager.saved] == [2, 3]
    other, _ = jobs.adapted()
    ucp.load(other, manager.latest.url if manager.latest else "")
    assert all((one == two).all() for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert verify(*read_source(f"{run}/step-00000002"), deep=True).ok
