"""Mirrors of runs: what is whole comes over with its record, and a mirror killed anywhere is finished by the next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.lifecycle.made import files
from ucp.errors import ConflictError, CorruptError, NotFoundError, UsageError
from ucp.lifecycle.shelf import Contents, Shelf
from ucp.lifecycle.sync import sync
from ucp.store import LocalStore
from ucp.testing.faults import Fault, crashes, placed


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """The folder of a run: steps 2 and 3 with their records, and step 4, whose save was cut short."""
    folder = tmp_path / "run"
    shelf = Shelf(str(folder))
    for step in (2, 3):
        shutil.copytree(saved / f"native-{step}", folder / f"step-{step:08}")
        shelf.record(step, {"loss": 1 / step})
    shutil.copytree(saved / "native-3", folder / "step-00000004")
    (folder / "step-00000004" / "ucp.json").unlink()
    return folder


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


def whole(run: Path) -> dict[str, bytes]:
    """What a mirror of `run` must hold."""
    return {path: data for path, data in files(run).items() if not path.startswith("step-00000004")}


def of_step(run: Path, step: int) -> dict[str, bytes]:
    return {path: data for path, data in files(run / f"step-{step:08}").items() if not path.startswith(".ucp-journal")}


def test_a_mirror_holds_what_is_whole(run: Path, there: Path) -> None:
    report = sync(str(run), str(there), verify=True)
    assert report.copied == [3, 2]
    assert files(there) == whole(run)
    assert report.bytes_verified == report.bytes_copied
    assert [saved.metrics for saved in Shelf(str(there)).contents().saved] == [{"loss": 1 / 2}, {"loss": 1 / 3}]


def test_a_second_sync_copies_only_what_is_new(run: Path, there: Path) -> None:
    shutil.move(run / "step-00000003", run.parent / "later")
    assert sync(str(run), str(there)).copied == [2]
    shutil.move(run.parent / "later", run / "step-00000003")
    report = sync(str(run), str(there))
    assert (report.copied, report.present) == ([3], [2])
    report = sync(str(run), str(there), verify=True)
    assert (report.copied, report.present, report.bytes_copied) == ([], [3, 2], 0)
    assert report.bytes_verified > 0
    assert files(there) == whole(run)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_verifying_mends_what_was_damaged_there(run: Path, there: Path) -> None:
    sync(str(run), str(there))
    shard = next((there / "step-00000002" / "shards").iterdir())
    flip(shard)
    assert sync(str(run), str(there)).copied == [], "of the same size: only reading tells"
    report = sync(str(run), str(there), verify=True)
    assert (report.copied, report.mended, report.present) == ([2], [2], [3])
    assert report.bytes_copied == shard.stat().st_size
    assert files(there) == whole(run)


def test_what_is_damaged_in_both_places_is_told_and_stays(run: Path, there: Path) -> None:
    sync(str(run), str(there))
    shard = next((there / "step-00000002" / "shards").iterdir())
    flip(shard)
    flip(run / "step-00000002" / "shards" / shard.name)
    before = files(there)
    with pytest.raises(CorruptError, match=str(run)):
        sync(str(run), str(there), verify=True)
    assert files(there) == before


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_what_a_mirror_has_lost_is_put_back(run: Path, there: Path, how: str, verify: bool) -> None:
    (run / "step-00000003" / "README").write_text("of somebody else")
    sync(str(run), str(there))
    for lost in (next((there / "step-00000002" / "shards").iterdir()), there / "step-00000003" / "README"):
        lost.unlink() if how == "missing" else lost.write_bytes(lost.read_bytes()[:-1])
    report = sync(str(run), str(there), verify=verify)
    assert (report.copied, report.mended, report.present) == ([3, 2], [3, 2], [])
    assert files(there) == whole(run)
    assert sync(str(run), str(there), verify=verify).present == [3, 2]


def test_what_goes_at_the_source_meanwhile_stays_where_it_is_complete(
    run: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(str(run), str(there))
    before = of_step(there, 3)
    mirror = Shelf.contents

    def prune(shelf: Shelf) -> Contents:
        found = mirror(shelf)
        if shelf.address == str(there):
            Shelf(str(run)).remove(3)
        return found

    monkeypatch.setattr(Shelf, "contents", prune)
    assert sync(str(run), str(there)).vanished == [3]
    assert of_step(there, 3) == before


def test_records_follow(run: Path, there: Path) -> None:
    sync(str(run), str(there))
    Shelf(str(run)).record(3, {"loss": 0.25}, aside=True)
    sync(str(run), str(there))
    assert json.loads((there / "step-00000003.json").read_text())["aside"] is True


def test_delete_makes_the_mirror_like_the_source(run: Path, there: Path) -> None:
    sync(str(run), str(there))
    Shelf(str(run)).remove(2)
    assert sync(str(run), str(there)).deleted == []
    assert len(Shelf(str(there)).contents().saved) == 2
    assert sync(str(run), str(there), delete=True).deleted == [2]
    assert files(there) == whole(run)


def test_an_empty_source_deletes_nothing(run: Path, there: Path) -> None:
    """As a folder that is not mounted looks empty."""
    sync(str(run), str(there))
    before = files(there)
    (run.parent / "unmounted").mkdir()
    with pytest.raises(NotFoundError):
        sync(str(run.parent / "unmounted"), str(there), delete=True)
    assert files(there) == before


def test_another_checkpoint_of_a_step_is_told_and_replaced_when_asked(run: Path, there: Path, saved: Path) -> None:
    sync(str(run), str(there))
    shutil.rmtree(run / "step-00000002")
    shutil.copytree(saved / "native-3", run / "step-00000002")
    shutil.rmtree(there / "step-00000003")
    with pytest.raises(ConflictError, match="step-00000002"):
        sync(str(run), str(there))
    assert (there / "step-00000003" / "ucp.json").exists()
    report = sync(str(run), str(there), delete=True)
    assert report.replaced == [2]
    assert files(there) == whole(run)


def test_files_of_somebody_else_are_left(run: Path, there: Path) -> None:
    (there / "step-00000003").mkdir(parents=True)
    (there / "step-00000003" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no record"):
        sync(str(run), str(there), delete=True)
    assert files(there)["step-00000003/notes.txt"] == b"mine"


def test_overlapping_runs_are_refused(run: Path) -> None:
    for other in (run, run / "mirror", run.parent):
        with pytest.raises(UsageError, match="overlap"):
            sync(str(run), str(other))


def test_what_retention_deletes_meanwhile_is_left_out(run: Path, there: Path) -> None:
    source = Shelf(str(run))

    def prune(_: object) -> None:
        if not source.complete(3):
            return
        source.remove(3)

    report = sync(str(run), str(there), on_progress=prune)
    assert report.vanished == [3]
    assert report.copied == [2]
    assert not list(there.glob("step-00000003*"))


@pytest.mark.parametrize("delete", [False, True])
def test_killed_at_every_operation(run: Path, there: Path, tmp_path: Path, delete: bool) -> None:
    """Whatever is complete in the mirror is whole, and the next run finishes it."""
    old = tmp_path / "old"
    if delete:
        sync(str(run), str(old))
        Shelf(str(run)).remove(2)
    expected = whole(run)

    def work(fault: Fault) -> None:
        with placed(there=fault.around(LocalStore(str(there)))):
            sync(str(run), "placed://there", workers=1, delete=delete)

    if delete:
        shutil.copytree(old, there)
    died = 0
    for one in crashes(work, how="before"):
        died += 1
        shelf = Shelf(str(there))
        for saved in shelf.contents().saved:
            held, source = (
                of_step(folder, saved.step) for folder in (there, old if saved.step == 2 and delete else run)
            )
            assert held == source, one
        sync(str(run), str(there), workers=1, delete=delete)
        assert files(there) == expected, one
        shutil.rmtree(there)
        if delete:
            shutil.copytree(old, there)
    assert died > 10


@pytest.mark.parametrize("damaged", ["root", "shard"])
def test_a_damaged_source_never_costs_the_mirror_what_is_good(
    run: Path, there: Path, saved: Path, damaged: str
) -> None:
    """It differs from its mirror because it is damaged: the mirror is the one that is right."""
    sync(str(run), str(there))
    before = of_step(there, 3)
    folder = run / "step-00000003"
    if damaged == "shard":  # of another checkpoint, so that the mirror's is to be replaced
        shutil.rmtree(folder)
        shutil.copytree(saved / "native-2", folder)
    victim = folder / "ucp.json" if damaged == "root" else next((folder / "shards").iterdir())
    data = bytearray(victim.read_bytes())
    data[-9] ^= 1
    victim.write_bytes(data)
    shutil.rmtree(there / "step-00000002")
    for delete in (False, True):
        with pytest.raises(CorruptError if delete or damaged == "root" else ConflictError) as caught:
            sync(str(run), str(there), delete=delete)
        assert "--delete" not in (caught.value.hint or "") or damaged == "shard"
        assert of_step(there, 3) == before
        assert of_step(there, 2) == of_step(run, 2), "the others are copied all the same"
