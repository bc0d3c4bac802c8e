"""Saves that share: what stays as it is, is stored once, whatever layout saves it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ucp
from tests.share.made import pool, size
from tests.support.gloo import spawn
from tests.train.save import shared_jobs as jobs
from ucp.errors import StorageError, UsageError
from ucp.format.native_manifest import loads
from ucp.lifecycle.gc import gc
from ucp.mapping import read_source
from ucp.run.compare import compare
from ucp.run.verify import verify
from ucp.share import lease as leases
from ucp.store import open_store
from ucp.testing.faults import crashes, placed

MIB = 1 << 20


def manifest(folder: Path) -> dict:
    return json.loads((folder / "ucp.json").read_bytes())


def assert_holds(url: Path, model: nn.Module) -> None:
    with ucp.open(str(url)) as found:
        for name, tensor in model.state_dict().items():
            assert torch.equal(found[name]["value"][...], tensor), name
    assert verify(*read_source(str(url)), deep=True).ok


def test_storage_of_saves_of_an_adapter(tmp_path: Path) -> None:
    """Ten saves of a model whose base is frozen take the room of one, and ten adapters."""
    model, optimizer = jobs.adapted()
    base = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for step in range(10):
        jobs.train(model, optimizer, step)
        plain = ucp.save((model, optimizer), str(tmp_path / "plain" / f"step-{step}"), step=step)
        report = ucp.save((model, optimizer), str(tmp_path / "run" / f"step-{step}"), step=step, share=True)
        assert (report.bytes_written < base / 4) == (step > 0)
        assert plain.bytes_written > base
    assert base > 20 * trained
    assert size(tmp_path / "plain") > 10 * base
    assert size(tmp_path / "run") < base + 10 * (3 * trained + 64 * 1024)
    assert_holds(tmp_path / "run" / "step-9", model)
    one, other = (read_source(str(tmp_path / kind / "step-3")) for kind in ("run", "plain"))
    assert compare(one, other, training_state=True, workers=1, on_progress=None).ok


def test_half_frozen_and_what_did_not_change(tmp_path: Path) -> None:
    """A trained parameter that is left alone from the second save on is stored once more, and then no more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Linear(512, 512), nn.Linear(512, 4))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    written = []
    for step in range(4):
        with torch.no_grad():
            model[3].weight += 1
        model(torch.randn(3, 512))
        written.append(ucp.save(model, str(tmp_path / f"step-{step}"), share=True).bytes_written)
        assert_holds(tmp_path / f"step-{step}", model)
    assert written[0] > 2 * MIB
    assert MIB < written[1] < 1.2 * MIB
    assert max(written[2:]) < 0.1 * MIB
    before = copy.deepcopy(model)
    with torch.no_grad():
        model[2].weight[511, 511] += 1
    ucp.save(model, str(tmp_path / "step-4"), share=True)
    assert_holds(tmp_path / "step-4", model)
    assert_holds(tmp_path / "step-3", before)


def test_manifests_say_what_is_shared(tmp_path: Path) -> None:
    model, optimizer = jobs.adapted()
    ucp.save((model, optimizer), str(tmp_path / "step-0"), share=True)
    ucp.save(model.lora, str(tmp_path / "plain"))
    doc = manifest(tmp_path / "step-0")
    assert doc["version"] == "1.1"
    assert manifest(tmp_path / "plain")["version"] == "1.0"
    rows = [row for row in doc["shards"] if "shared" in row]
    assert {row["shared"] for row in rows} == pool(tmp_path)
    assert all("path" not in row for row in rows)
    assert {shard.path for shard in loads((tmp_path / "step-0" / "ucp.json").read_bytes(), where="").shards} == {
        *(f"shared/{name}" for name in pool(tmp_path)),
        *(row["path"] for row in doc["shards"] if "path" in row),
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_share_what_they_hold_together(tmp_path: Path, kind: str) -> None:
    """Saved by three ranks, then by two: what ranks hold whole is the same whoever writes it."""
    spawn(jobs.save_steps, 3, str(tmp_path), kind, [0, 1])
    first = pool(tmp_path)
    spawn(jobs.save_steps, 2, str(tmp_path), kind, [2])
    if kind == "ddp":
        assert len(pool(tmp_path) - first) <= 2, "large frozen tensors are there already, however many ranks save"
    for step in range(3):
        model, _ = jobs.adapted()
        assert_holds(tmp_path / f"step-{step}", model)
    gc(str(tmp_path), grace=0)
    assert not gc(str(tmp_path), grace=0).removed, "no lease is left"


def test_asynchronous_saves_share(tmp_path: Path) -> None:
    model, optimizer = jobs.adapted()
    handles = [ucp.async_save((model, optimizer), str(tmp_path / f"step-{n}"), step=n, share=True) for n in range(3)]
    sizes = [handle.result().bytes_written for handle in handles]
    assert max(sizes[1:]) < sizes[0] / 4
    assert_holds(tmp_path / "step-2", model)


def test_a_doomed_object_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = jobs.adapted()
    ucp.save((model, optimizer), str(tmp_path / "step-0"), share=True)
    doomed = frozenset(pool(tmp_path))
    monkeypatch.setattr(leases, "look", lambda store: leases.Offer({}, doomed))
    ucp.save((model, optimizer), str(tmp_path / "step-1"), share=True)
    assert not [row for row in manifest(tmp_path / "step-1")["shards"] if "shared" in row]
    assert_holds(tmp_path / "step-1", model)


def test_an_object_that_is_collected_before_the_commit_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = jobs.adapted()
    confirm = leases.Lease.confirm

    def late(self, wanted):
        for name in wanted:
            self.pool.delete(name)
        confirm(self, wanted)

    monkeypatch.setattr(leases.Lease, "confirm", late)
    with pytest.raises(StorageError, match="is gone"):
        ucp.save((model, optimizer), str(tmp_path / "step-0"), share=True)
    assert not (tmp_path / "step-0" / "ucp.json").exists()
    assert not list((tmp_path / "shared" / "writers").glob("*"))


def test_killed_at_every_operation(tmp_path: Path) -> None:
    """What was complete stays whole, and the next save shares with it."""
    model, optimizer = jobs.adapted()
    ucp.save((model, optimizer), str(tmp_path / "step-0"), share=True)
    points = 0

    def work(fault):
        with placed(run=fault.around(open_store(str(tmp_path)))):
            ucp.save((model, optimizer), "placed://run/step-1", share=True)

    for crash in crashes(work):
        points += 1
        assert verify(*read_source(str(tmp_path / "step-0"))).ok, crash.at
        if (tmp_path / "step-1" / "ucp.json").exists():
            assert_holds(tmp_path / "step-1", model)
            break
    assert points > 10
    ucp.save((model, optimizer), str(tmp_path / "step-2"), share=True)
    assert_holds(tmp_path / "step-2", model)


def test_what_cannot_share_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="share nothing"):
        ucp.save({"w": torch.ones(3)}, str(tmp_path / "x"), form="universal", share=True)
