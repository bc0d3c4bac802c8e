"""The collector: nothing that a checkpoint needs ever goes, everything else does once it has stayed so long enough."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import ucp
from tests.commit.places import LocalPlace, ObjectPlace
from tests.share.made import check, exported, pool, source
from ucp.errors import ConflictError, CorruptError, NotFoundError, UsageError
from ucp.format.pool import content_name
from ucp.lifecycle.gc import GcReport, gc, grace_seconds
from ucp.lifecycle.shelf import Shelf
from ucp.run.claim import FOLDER, HEAD
from ucp.share.lease import LEASES, Lease, look, put_shared
from ucp.share.ledger import LEDGER, read_ledger
from ucp.store import LocalStore, Store, open_store
from ucp.testing.faults import Fault, crashes, placed

HOUR = 3600.0
RECORD = b'{"format": "step", "version": 1, "step": 4, "metrics": {}, "aside": false}'


class Run:
    """The collector of a run, by a clock of its own."""

    def __init__(self, url: str | Path) -> None:
        self.url, self.now = str(url), 1_000_000.0

    def collect(self, *, after: float = 0.0, grace: float = HOUR, dry_run: bool = False) -> GcReport:
        self.now += after
        return gc(self.url, grace=grace, dry_run=dry_run, clock=lambda: self.now)


def removed(report: GcReport) -> set[str]:
    return {one.path for one in report.removed}


def condemned(report: GcReport) -> set[str]:
    return {one.path for one in report.condemned}


def drop(run: Path, name: str) -> set[str]:
    """Delete a checkpoint; the objects that were its alone."""
    before = {one: references(run, one) for one in os.listdir(run) if one.startswith("step-")}
    shutil.rmtree(run / name)
    return before.pop(name).difference(*before.values())


def references(run: Path, name: str) -> set[str]:
    doc = json.loads((run / name / "zarr.json").read_bytes())
    arrays = [array for tensor in doc["attributes"]["ucp"]["tensors"] for array in tensor["arrays"]]
    return {row["shared"] for array in arrays for row in array["objects"]}


def test_two_phases_with_the_grace_period_between(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1, 2)
    run = Run(folder)
    assert not run.collect().removed
    gone = drop(folder, "step-1")
    assert len(gone) == 1
    first = run.collect(after=100 * HOUR)
    assert not first.removed
    assert condemned(first) == {f"shared/{name}" for name in gone}
    assert not run.collect(after=0.9 * HOUR).removed
    plan = run.collect(after=0.2 * HOUR, dry_run=True)
    assert gone <= pool(folder), "a dry run changes nothing"
    assert removed(plan) == removed(run.collect()) == {f"shared/{name}" for name in gone}
    assert pool(folder) == references(folder, "step-2")
    check(folder / "step-2", 2)
    again = run.collect(after=100 * HOUR)
    assert (again.removed, again.condemned, again.complete) == ((), (), ("step-2",))


def test_what_is_needed_again_is_condemned_no_more(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1, 2)
    run = Run(folder)
    gone = drop(folder, "step-1")
    run.collect()
    exported(tmp_path, 1)
    assert not run.collect(after=2 * HOUR).removed
    assert gone <= pool(folder)
    drop(folder, "step-1")
    assert not run.collect(after=2 * HOUR).removed, "its grace period begins anew"
    assert removed(run.collect(after=2 * HOUR)) == {f"shared/{name}" for name in gone}


def test_nothing_goes_in_the_run_that_first_sees_it(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1, 2)
    drop(folder, "step-1")
    run = Run(folder)
    assert not run.collect(grace=0).removed
    assert len(run.collect(grace=0).removed) == 1


def test_a_clock_that_goes_back_only_prolongs(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1, 2)
    drop(folder, "step-1")
    run = Run(folder)
    run.collect()
    run.collect(after=-50 * HOUR)
    assert not run.collect(after=0.5 * HOUR).removed
    assert len(run.collect(after=0.6 * HOUR).removed) == 1


def test_a_root_that_cannot_be_read_keeps_everything(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1, 2)
    drop(folder, "step-1")
    run = Run(folder)
    run.collect()
    path = folder / "step-2" / "zarr.json"
    text = path.read_text()
    path.write_text(text.replace('"step"', '"stop"', 1))
    with pytest.raises(CorruptError, match="step-2"):
        run.collect(after=2 * HOUR)
    path.write_text(text)
    assert len(pool(folder)) == 4
    assert len(run.collect().removed) == 1


def test_what_interrupted_work_left_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1)
    ours = {
        "step-2/shards/rank-00000-0-0123abcd.safetensors": b"x",
        f"step-3/{HEAD}": b"{}",
        "step-3/tensors/w/c/0/0": b"y",
        "step-00000004.json": RECORD,
        "step-00000005.json.12-34.tmp": b"{",
        f"shared/{'a' * 64}.12-34.tmp": b"half",
        "step-1/shards/rank-00000-0-0123abcd.safetensors": b"of a save that was killed",
        "step-1/tensors.0123456789ab/w/c/0/0": b"of another that was",
        "step-1/digests.bin.7-8.tmp": b"z",
    }
    theirs = {
        "notes.txt": b"1",
        "step-20261123.json": b'{"mine": 1}',
        "logs/events": b"2",
        "mixed/shards/rank-00000-0-0123abcd.safetensors": b"3",
        "mixed/README": b"4",
        "step-1/README": b"5",
        "step-1/tensors/notes": b"7",
        "step-1/state/notes": b"8",
        "step-1/ucp-copy.json": b"{}",
        "shared/README": b"6",
        "group/zarr.json": b'{"zarr_format": 3, "node_type": "group"}',
    }
    for path, data in (ours | theirs).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    run = Run(folder)
    found = run.collect()
    assert set(found.foreign) == {"notes.txt", "step-20261123.json", "logs/", "mixed/", "shared/README", "group/"}
    assert not found.removed
    (folder / "step-3/tensors/w/c/0/0").write_bytes(b"somebody is at work")
    after = run.collect(after=2 * HOUR)
    assert "step-3/" not in removed(after)
    assert removed(after) == {
        *("step-1/", "step-2/", "step-00000004.json", "step-00000005.json.12-34.tmp"),
        f"shared/{'a' * 64}.12-34.tmp",
    }
    assert removed(run.collect(after=2 * HOUR)) == {"step-3/"}
    assert not [path for path in ours if (folder / path).exists()]
    assert all((folder / path).read_bytes() == data for path, data in theirs.items())
    assert not (folder / "step-2").exists()
    check(folder / "step-1", 1)
    assert not run.collect(after=2 * HOUR).removed


def test_a_writer_is_waited_for_and_one_that_is_dead_is_not(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1, 2)
    run, store = Run(folder), LocalStore(str(folder / "shared"))
    (name,) = drop(folder, "step-1")
    run.collect()
    lease = Lease(store, "step-3")
    assert lease.offer.has(store, name, store.entry(name).size)
    waited = run.collect(after=2 * HOUR)
    assert not waited.removed
    assert waited.waiting == (lease.name,)
    assert look(store).doomed == {name}, "who begins now does not use it"
    lease.confirm({name: store.entry(name).size})
    assert not run.collect(after=2 * HOUR).removed, "it has renewed its lease"
    assert removed(run.collect(after=2 * HOUR)) == {f"shared/{name}", f"shared/{LEASES}{lease.name}"}
    with pytest.raises(ucp.StorageError, match="taken for dead"):
        lease.confirm({})


def test_a_writer_that_releases_its_lease_is_not_waited_for(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1, 2)
    run, store = Run(folder), LocalStore(str(folder / "shared"))
    (name,) = drop(folder, "step-1")
    run.collect()
    lease = Lease(store, "step-3")
    run.collect(after=2 * HOUR)
    exported(tmp_path, 1)
    assert look(store).doomed == {name}
    assert references(folder, "step-2") <= pool(folder)
    held = json.loads((folder / "step-1" / "zarr.json").read_bytes())["attributes"]["ucp"]["tensors"][2]["arrays"][0]
    assert "shared" not in held["objects"][0], "what is doomed is kept in the folder"
    check(folder / "step-1", 1)
    lease.release()
    assert removed(run.collect()) == {f"shared/{name}"}
    check(folder / "step-1", 1)


def test_a_damaged_ledger_costs_room_and_no_checkpoint(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1)
    (folder / "shared" / LEDGER).write_text("{")
    exported(tmp_path, 2)
    assert len(pool(folder)) == 3
    check(folder / "step-2", 2)
    with pytest.raises(CorruptError):
        gc(str(folder))


def test_a_reader_of_what_is_kept_sees_no_change(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1, 2, 3)
    opened = ucp.open(str(folder / "step-3"))
    drop(folder, "step-1")
    drop(folder, "step-2")
    run = Run(folder)
    run.collect()
    assert len(run.collect(after=2 * HOUR).removed) == 2
    assert float(opened["adapter"]["value"][...].sum()) == 45.0


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        gc(str(tmp_path / "nothing"))
    folder = exported(tmp_path, 1)
    with pytest.raises(UsageError, match="is a checkpoint"):
        gc(str(folder / "step-1"))
    with LocalStore(str(folder)).exclusive(), pytest.raises(ConflictError):
        gc(str(folder))
    (folder / "shared" / LEDGER).write_text("{}")
    with pytest.raises(CorruptError, match="delete it"):
        gc(str(folder))


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("24h", 86400), ("7d", 604800), ("0", 0), ("1.5s", 1.5)])
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert grace_seconds(text) == seconds


@pytest.mark.parametrize("wrong", ["", "h", "-1", "1w", -1.0, float("inf"), float("nan"), True])
def test_what_is_no_length_of_time(wrong: str | float) -> None:
    with pytest.raises(UsageError):
        grace_seconds(wrong)


def _littered(store: Store, tmp_path: Path) -> None:
    """A run with two checkpoints, objects of one that is gone, and remains of all kinds, all noted long ago."""
    with placed(run=store):
        for step in (1, 2, 3):
            ucp.convert(source(tmp_path, step), f"placed://run/step-{step}", share=True, workers=1)
        for entry in list(store.entries("step-3/")):
            store.delete(entry.path)
        for path in ("tensors/w/c/0/0", f"{FOLDER}000000.jsonl", HEAD):
            store.put(f"step-4/{path}", b"{}")
        store.put("step-5/shards/rank-00000-0-0123abcd.safetensors", b"x")
        store.put("step-1/state.0123456789ab.json", b"{}")
        Shelf("placed://run").record(7, {"loss": 2.0})
        store.put("theirs/notes", b"theirs")
        Lease(store.child("shared"), "step-6")
        gc("placed://run", grace=HOUR, clock=lambda: 0.0)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
@pytest.mark.parametrize("kind", [LocalPlace, ObjectPlace])
def test_killed_at_every_operation_it_keeps_every_checkpoint_and_ends_another_time(
    tmp_path: Path, kind: type, step: int
) -> None:
    place = kind()
    _littered(place.store, tmp_path)
    before, points = place.state(), 0

    def work(fault: Fault) -> None:
        with placed(run=fault.around(place.store)):
            for hours in (2, 4):  # what is put back on a disk has new times, and is noted once more
                gc("placed://run", grace=HOUR, clock=lambda hours=hours: hours * HOUR)

    def finished() -> set[str]:
        with placed(run=place.store):
            for hours in (6, 8, 10, 12):
                gc("placed://run", grace=HOUR, clock=lambda hours=hours: hours * HOUR)
            for step in (1, 2):
                check(f"placed://run/step-{step}", step)
        return place.state().keys() - {f"shared/{LEDGER}"}

    whole = finished()
    assert not {path for path in whole if path.startswith(("step-3", "step-4", "step-5", "step-0", f"shared/{LEASES}"))}
    for how in ("before", "torn"):
        place.put_back(before)
        for crash in crashes(work, how=how, step=step):  # type: ignore[arg-type]
            points += 1
            with placed(run=place.store):
                for step in (1, 2):
                    check(f"placed://run/step-{step}", step)
            assert finished() == whole, crash.at
            place.put_back(before)
    place.close()
    assert points > 100 // step


def test_the_ledger_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = exported(tmp_path, 1, 2)
    drop(folder, "step-1")
    Run(folder).collect()
    ledger, seen = read_ledger(open_store(str(folder / "shared")))
    assert seen is not None
    assert list(ledger.unreferenced.values()) == [1_000_000.0]


def test_folders_of_others_that_look_like_ours_stay(tmp_path: Path) -> None:
    """A ``state.json``, Zarr arrays in ``tensors``: others have these too, and nothing shows that they are ours."""
    folder = exported(tmp_path, 1)
    store = LocalStore(str(folder))
    theirs = ["sampler/state.json", "analysis/tensors/zarr.json", "analysis/tensors/w/c/0/0"]
    for path in theirs:
        store.put(path, b"{}")
    run = Run(folder)
    run.collect()
    report = run.collect(after=2 * HOUR)
    assert not report.removed
    assert all(store.exists(path) for path in theirs)
    assert {"sampler/", "analysis/"} <= set(report.foreign)


def test_what_is_left_of_a_recorded_step_goes(tmp_path: Path) -> None:
    """A deletion that was cut short: what is left shows nothing by itself, but the run has noted the step."""
    folder = exported(tmp_path, 1)
    store = LocalStore(str(folder))
    store.put("step-00000009/tensors/w/c/0/0", b"1")
    Shelf(str(folder)).record(9, {})
    run = Run(folder)
    run.collect()
    run.collect(after=2 * HOUR)
    assert not store.exists("step-00000009/tensors/w/c/0/0")


def test_only_what_is_named_by_its_content_goes_from_a_pool(tmp_path: Path) -> None:
    """Others keep files under digests too, though not of this kind, and folders called ``writers``."""
    store = LocalStore(str(tmp_path / "run"))
    theirs = [f"shared/{hashlib.sha256(b'theirs').hexdigest()}", f"shared/{LEASES}alice.txt"]
    for path in theirs:
        store.put(path, b"theirs")
    ours = store.child("shared")
    put_shared(ours, b"ours")
    run = Run(tmp_path / "run")
    for _ in range(3):
        run.collect(after=2 * HOUR)
    assert all(store.exists(path) for path in theirs)
    assert not ours.exists(content_name(b"ours"))
