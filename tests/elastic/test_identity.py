"""Whose versions nodes hold: those of another run, which had the same URL or the same job before, are never taken."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

from tests.elastic.test_run import breaks_off, go, no_launcher, run_of, state
from ucp.elastic import Memory, Run, keep
from ucp.elastic.nodes import NodeFolder
from ucp.elastic.records import Records
from ucp.elastic.versions import RUN_FILE
from ucp.errors import CorruptError, NotFoundError, StorageError

__all__ = ["no_launcher"]


def steps_held(tmp_path):
    """(epoch, step) of the versions in memory."""
    return sorted((path.parent.parent.name, path.parent.name) for path in (tmp_path / "memory").rglob("ucp.json"))


def test_memory_of_a_run_whose_url_was_deleted_is_not_resumed(tmp_path, caplog):
    memory, at_3 = breaks_off(tmp_path, 3)
    shutil.rmtree(tmp_path / "run")
    with caplog.at_level(logging.INFO, "ucp"), run_of(tmp_path, memory=memory) as run:
        model, optimizer = state(1)
        before = model.weight.detach().clone()
        assert run.resume((model, optimizer)) is None
        assert torch.equal(model.weight, before)
        assert not torch.equal(model.weight, at_3)
        assert steps_held(tmp_path) == []
        assert (run.report.tier, run.report.step, run.report.steps_lost, run.report.at_least) == (None, 0, 0, False)
        assert "detect" not in run.report.parts
    assert "left step 3 of epoch 1 in memory: of another run" in caplog.text


def test_checkpoints_that_are_gone_are_not_taken_for_a_run_that_begins(tmp_path):
    """Storage tells that there were some, also where nodes held none."""

    def fails(until):
        with run_of(tmp_path, every=1) as run:
            go(run, until)
            run.save(until, state()).result()
            raise ValueError("no luck")

    for until in (2, 4):
        with pytest.raises(ValueError, match="no luck"):
            fails(until)
    for folder in (tmp_path / "run").glob("step-*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    told = r"nothing is left to go on from:\n  the version of step 2, from which epoch 2 went on"
    with pytest.raises(NotFoundError, match=told), run_of(tmp_path, every=1) as run:
        run.resume(state())


def test_it_is_there_until_the_new_run_begins(tmp_path):
    memory, _ = breaks_off(tmp_path, 3)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match="no luck"), run_of(tmp_path, memory=memory):
        raise ValueError("no luck")
    assert steps_held(tmp_path) == [("e00001", "step-00000003")]
    # What a start left that came to nothing is not taken for what the one before had done.
    with run_of(tmp_path, memory=memory) as run:
        go(run, 1)
        assert (run.report.tier, run.report.steps_lost, run.report.at_least) == (None, 0, False)


def test_the_new_run_goes_on_from_its_own(tmp_path):
    memory, _ = breaks_off(tmp_path, 5)
    shutil.rmtree(tmp_path / "run")
    _, at_2 = breaks_off(tmp_path, 2)
    with run_of(tmp_path, memory=memory) as run:
        assert torch.equal(go(run, 2, seed=1), at_2)
        assert (run.report.tier, run.report.step, run.report.steps_lost) == ("memory", 2, 0)


def test_one_job_with_another_folder_of_checkpoints_is_another_run(tmp_path):
    memory, _ = breaks_off(tmp_path, 3, job="j")
    with Run(str(tmp_path / "other"), layouts=keep(), memory=memory, job="j") as run:
        go(run, 1)
        assert run.report.tier is None


def test_the_remedy_of_a_run_that_cannot_go_on_works(tmp_path):
    memory, _ = breaks_off(tmp_path, 3)
    (shard,) = (tmp_path / "memory").rglob("shards/rank-*")
    shard.unlink()
    refused = pytest.raises(NotFoundError, match=r"nothing is left to go on from:\n  step 3 of epoch 1 in memory: nowh")
    with refused as told, run_of(tmp_path, memory=memory) as run:
        go(run, 4)
    assert told.value.hint.endswith(f"to begin anew, delete {tmp_path / 'run'} and start the job again")
    shutil.rmtree(tmp_path / "run")
    with run_of(tmp_path, memory=memory) as run:
        go(run, 4)
        assert run.report.tier is None


def test_what_nobody_says_whose_it_is_is_taken_as_before(tmp_path):
    memory, _ = breaks_off(tmp_path, 3)
    (said,) = (tmp_path / "memory").rglob(RUN_FILE)
    said.unlink()
    (tmp_path / "run" / "elastic" / "run.json").unlink()
    with run_of(tmp_path, memory=memory) as run:
        go(run, 4)
        assert (run.report.tier, run.report.step) == ("memory", 3)


def test_nothing_is_saved_on_a_node_that_cannot_say_whose_it_is(tmp_path, monkeypatch, caplog):
    put, full = NodeFolder.put, [True]

    def refuses(self, path, data, **options):
        if path == RUN_FILE and full[0]:
            raise StorageError(f"{path}: no space left on device")
        return put(self, path, data, **options)

    monkeypatch.setattr(NodeFolder, "put", refuses)
    memory = Memory(root=str(tmp_path / "memory"), every=1, copies=1, busy="wait")
    with run_of(tmp_path, memory=memory) as run:
        go(run, 2, of=100)
        assert (steps_held(tmp_path), run.report.unsaved) == ([], {"memory": 2})
        full[0] = False
        run.step(3, state())
        run.tiers[0].settle()
        assert steps_held(tmp_path) == [("e00001", "step-00000003")]
    assert "memory: step 1 is left out, training goes on: node n cannot be told" in caplog.text


def test_a_run_has_one_identity(tmp_path):
    first, second = Records(str(tmp_path)).identity(), Records(str(tmp_path)).identity()
    assert first == second
    doc = json.loads((tmp_path / "elastic" / "run.json").read_text())
    assert doc == {"format": "run", "version": 1, "id": first}
    assert Records(str(tmp_path / "other")).identity() != first


def test_of_two_that_begin_a_run_at_once_both_have_the_identity_of_the_first(tmp_path, monkeypatch):
    records = Records(str(tmp_path))
    store = type(records._store)
    put = store.put

    def late(self, path, data, **options):
        monkeypatch.setattr(store, "put", put)
        other.append(Records(str(tmp_path)).identity())
        put(self, path, data, **options)

    other: list[str] = []
    monkeypatch.setattr(store, "put", late)
    assert [records.identity()] == other


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"id": 3}', b'{"id": ""}', b"[" * 100_000])
def test_an_identity_that_is_damaged_is_an_error_with_its_remedy(tmp_path, data):
    (tmp_path / "elastic").mkdir()
    (tmp_path / "elastic" / "run.json").write_bytes(data)
    with pytest.raises(CorruptError, match=r"run\.json: does not tell which run"):
        Records(str(tmp_path)).identity()


def test_what_a_node_that_was_away_left_of_another_run_hides_nothing(tmp_path):
    """Its ranks had come to a later epoch than this run has."""
    memory, _ = breaks_off(tmp_path, 3, every=2)
    shutil.rmtree(next((tmp_path / "memory").rglob("e00001")))
    (beat,) = (tmp_path / "memory").rglob("beats/*")
    doc = json.loads(beat.read_text())
    assert doc["run"]
    (beat.parent / "e00009-00000").write_text(json.dumps({**doc, "epoch": 9, "step": 90, "run": "another"}))
    with run_of(tmp_path, memory=memory, every=2) as run:
        go(run, 4)
        assert (run.epoch, run.report.step, run.report.steps_lost, run.report.at_least) == (10, 2, 1, False)
