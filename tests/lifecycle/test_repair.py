"""Repairs: right bytes or none at all, from wherever they can be proved to be right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ucp
from tests.lifecycle.made import files
from ucp.errors import CorruptError, NotFoundError, UcpError, UsageError
from ucp.lifecycle.form import form_at
from ucp.lifecycle.repair import ITSELF, repair
from ucp.run.claim import claim
from ucp.run.verify import verify
from ucp.store import LocalStore
from ucp.testing.faults import Fault, crashes, placed

FORMS = ["native", "universal"]
NOTE = "ucp-conversion.json"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path) -> None:
    path.unlink()


HARM: list[Callable[[Path], None]] = [flip, truncate, lengthen, remove]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def whole(form: str, saved: Path) -> Path:
    return saved / f"{form}-3"


@pytest.fixture
def broken(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` to be broken."""
    shutil.copytree(whole, tmp_path / "broken")
    return tmp_path / "broken"


def is_whole(folder: Path) -> bool:
    opened = ucp.open(str(folder))
    return verify(opened.catalog, LocalStore(str(folder)), deep=True).ok


@pytest.mark.parametrize("harm", HARM)
def test_any_object_is_put_right_from_a_copy(broken: Path, whole: Path, harm: Callable[[Path], None]) -> None:
    expected = files(whole)
    for name in expected.keys() - {NOTE}:
        harm(broken / name)
        report = repair(str(broken), copies=[str(whole)])
        assert report.ok
        assert [one.path for one in report.repaired] == [name], name
        assert files(broken) == expected, name
        assert is_whole(broken)


@pytest.mark.parametrize("harm", HARM)
def test_all_objects_at_once(broken: Path, whole: Path, harm: Callable[[Path], None]) -> None:
    expected = files(whole)
    root = "zarr.json" if (whole / "zarr.json").exists() else "ucp.json"
    for name in expected.keys() - {NOTE, root}:
        harm(broken / name)
    report = repair(str(broken), copies=[str(whole)])
    assert {one.path for one in report.repaired} == expected.keys() - {NOTE, root}
    assert files(broken) == expected


def test_what_is_whole_is_left_alone(broken: Path, whole: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    report = repair(str(broken), copies=[str(whole)])
    assert report.ok
    assert not report.repaired
    assert report.objects == len(files(whole).keys() - {NOTE})
    assert report.bytes_read > 0
    assert {path: path.stat().st_mtime_ns for path in broken.rglob("*")} == times


def test_a_dry_run_tells_and_changes_nothing(broken: Path, whole: Path) -> None:
    for name in ("zarr.json", "ucp.json"):
        if (broken / name).exists():
            flip(broken / name)
    flip(max(broken.rglob("*.safetensors" if (broken / "ucp.json").exists() else "0"), key=lambda p: p.stat().st_size))
    before = files(broken)
    told = repair(str(broken), copies=[str(whole)], dry_run=True)
    assert files(broken) == before
    done = repair(str(broken), copies=[str(whole)])
    assert told.repaired == done.repaired
    assert len(done.repaired) == 2


def test_without_a_copy_what_follows_from_the_rest_is_put_right(saved: Path, tmp_path: Path) -> None:
    """Of the universal form: metadata of arrays, the digests, and what is around the data of objects."""
    whole, broken = saved / "universal-3", tmp_path / "broken"
    expected = files(whole)
    shutil.copytree(whole, broken)
    for name in expected:
        if name.startswith("tensors/") and name.endswith("zarr.json"):
            remove(broken / name)
    flip(broken / "digests.bin")
    report = repair(str(broken))
    assert report.ok
    assert {origin for one in report.repaired for origin in one.origins} == {ITSELF}
    assert files(broken) == expected
    largest = max((broken / "tensors").rglob("c/**/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[12] ^= 1
    data[-12] ^= 1
    largest.write_bytes(data)
    assert repair(str(broken)).repaired[0].origins == ("the manifest",)
    assert files(broken) == expected


def test_the_header_of_a_native_shard_follows_from_the_manifest(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "native-3", tmp_path / "broken")
    shard = next((tmp_path / "broken" / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[9] ^= 1
    shard.write_bytes(data)
    assert repair(str(tmp_path / "broken")).ok
    assert files(tmp_path / "broken") == files(saved / "native-3")


@pytest.mark.parametrize(("form", "other"), [("native", "universal"), ("universal", "native")])
def test_the_other_form_holds_the_same_bytes(saved: Path, tmp_path: Path, form: str, other: str) -> None:
    whole, broken = saved / f"{form}-3", tmp_path / "broken"
    shutil.copytree(whole, broken)
    objects = list(form_at(LocalStore(str(whole))).sizes)
    for number, name in enumerate(objects):
        HARM[number % 4](broken / name)
    report = repair(str(broken), copies=[str(saved / f"{other}-3")])
    assert report.ok
    assert files(broken) == files(whole)


def frozen_places(folder: Path) -> list[tuple[str, int, int]]:
    """(object, first byte, byte after the last) of the frozen parameter."""
    catalog = ucp.open(str(folder)).catalog
    extents = [fragment.extent for fragment in catalog.fragments[("0.bias", "value")]]  # type: ignore[index]
    return [(extent.object, *extent.span) for extent in extents]


def test_an_older_checkpoint_gives_what_did_not_change(saved: Path, broken: Path, whole: Path, form: str) -> None:
    for name, start, _ in frozen_places(broken):
        data = bytearray((broken / name).read_bytes())
        data[start] ^= 0xFF
        (broken / name).write_bytes(data)
    report = repair(str(broken), copies=[str(saved / f"{form}-2")])
    assert report.ok
    assert len(report.repaired) == len(frozen_places(whole))
    assert files(broken) == files(whole)


def test_a_wrong_copy_gives_nothing(saved: Path, broken: Path, form: str) -> None:
    """Step 2 for step 3: what training changed is not there, and stays as it is."""
    keys = ("2.weight", "exp_avg")
    extent = ucp.open(str(broken)).catalog.fragments[keys][0].extent  # type: ignore[index]
    data = bytearray((broken / extent.object).read_bytes())
    data[extent.offset] ^= 0xFF
    (broken / extent.object).write_bytes(data)
    before = files(broken)
    report = repair(str(broken), copies=[str(saved / f"{form}-2"), str(saved / "hf")])
    assert not report.ok
    assert [one.path for one in report.lost] == [extent.object]
    assert files(broken) == before
    assert repair(str(broken), copies=[str(saved / f"{form}-2"), str(saved / f"{form}-3")]).ok


def test_two_damaged_copies_mend_each_other(saved: Path, tmp_path: Path, form: str) -> None:
    whole = saved / f"{form}-3"
    names = sorted(form_at(LocalStore(str(whole))).sizes)
    for side in (0, 1):
        shutil.copytree(whole, tmp_path / str(side))
        for name in names[side::2]:
            flip(tmp_path / str(side) / name)
    assert repair(str(tmp_path / "0"), copies=[str(tmp_path / "1")]).ok
    assert repair(str(tmp_path / "1"), copies=[str(tmp_path / "0")]).ok
    assert files(tmp_path / "0") == files(tmp_path / "1") == files(whole)


def root_of(folder: Path) -> Path:
    return folder / ("ucp.json" if (folder / "shards").exists() else "zarr.json")


def test_a_lost_root_is_taken_only_from_a_copy_of_the_same(saved: Path, broken: Path, whole: Path, form: str) -> None:
    root_of(broken).unlink()
    before = files(broken)
    with pytest.raises(NotFoundError, match="no copy proves"):
        repair(str(broken), copies=[str(saved / f"{form}-2")])
    assert files(broken) == before
    assert repair(str(broken), copies=[str(saved / f"{form}-2"), str(whole)]).ok
    assert files(broken) == files(whole)


def test_a_lost_root_and_other_damage_prove_nothing(saved: Path, broken: Path, whole: Path) -> None:
    root_of(broken).unlink()
    flip(broken / next(iter(form_at(LocalStore(str(whole))).sizes)))
    with pytest.raises(NotFoundError, match="no copy proves"):
        repair(str(broken), copies=[str(whole)])


def test_a_root_that_still_tells_its_id_is_replaced_with_other_damage(broken: Path, whole: Path) -> None:
    flip(root_of(broken))
    name = next(iter(form_at(LocalStore(str(whole))).sizes))
    remove(broken / name)
    assert repair(str(broken), copies=[str(whole)]).ok
    assert files(broken) == files(whole)


def test_an_unfinished_checkpoint_is_not_repaired(saved: Path, broken: Path, whole: Path) -> None:
    root_of(broken).unlink()
    claim(LocalStore(str(broken)), "some plan")
    with pytest.raises(NotFoundError, match="never finished"):
        repair(str(broken), copies=[str(whole)])


def test_the_checkpoint_itself_is_no_copy(broken: Path) -> None:
    with pytest.raises(UsageError, match="itself"):
        repair(str(broken), copies=[str(broken)])


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(NotFoundError):
        repair(str(tmp_path / "nowhere"), copies=[str(whole)])
    assert not (tmp_path / "nowhere").exists()


def test_random_flips_are_all_put_right(broken: Path, whole: Path) -> None:
    """Many at once, anywhere but in the root and in the note that nothing depends on."""
    random = np.random.default_rng(5)
    names = sorted(files(whole).keys() - {NOTE, root_of(whole).name})
    for name in random.choice(names, 12):
        data = bytearray((broken / name).read_bytes())
        for at in random.integers(0, len(data), 3):
            data[at] ^= 1 << random.integers(8)
        (broken / name).write_bytes(data)
    assert repair(str(broken), copies=[str(whole)]).ok
    assert files(broken) == files(whole)


@pytest.mark.parametrize("how", ["before", "torn"])
def test_killed_at_every_operation(broken: Path, whole: Path, tmp_path: Path, how: str) -> None:
    """Every object is as it was or right, never anything else; the next repair ends it."""
    expected = files(whole)
    flip(root_of(broken))
    for number, name in enumerate(sorted(expected.keys() - {NOTE, root_of(whole).name})):
        HARM[number % 4](broken / name)
    damaged = files(broken)
    pristine = tmp_path / "pristine"
    shutil.copytree(broken, pristine)

    def work(fault: Fault) -> None:
        with placed(broken=fault.around(LocalStore(str(broken)))):
            repair("placed://broken", copies=[str(whole)], workers=1)

    died = 0
    for one in crashes(work, how=how, step=3):
        died += 1
        for name, data in files(broken).items():
            if not name.endswith(".tmp"):
                assert data in (damaged.get(name), expected[name]), (one, name)
        assert repair(str(broken), copies=[str(whole)], workers=1).ok
        assert files(broken) == expected, one
        shutil.rmtree(broken)
        shutil.copytree(pristine, broken)
    assert died > 10


def test_a_copy_that_is_unreadable_is_named(saved: Path, broken: Path, whole: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(whole, bad)
    flip(root_of(bad))
    flip(broken / next(iter(form_at(LocalStore(str(whole))).sizes)))
    report = repair(str(broken), copies=[str(bad)])
    assert report.notes
    assert "bad" in report.notes[0]
    with pytest.raises(UcpError):
        repair(str(broken), copies=[str(tmp_path / "nothing")])


def test_storage_that_damages_is_noticed(broken: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(broken / next(iter(form_at(LocalStore(str(whole))).sizes)))
    close = LocalStore.replace

    def lying(self: LocalStore, path: str, size: int) -> object:
        writer = close(self, path, size)
        write = writer.write_at
        writer.write_at = lambda at, data: write(at, bytes(len(data)))  # type: ignore[method-assign]
        return writer

    monkeypatch.setattr(LocalStore, "replace", lying)
    with pytest.raises(CorruptError, match="other bytes"):
        repair(str(broken), copies=[str(whole)])
