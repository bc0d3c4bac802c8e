"""Conversions that share: one object for one content, and checkpoints that are like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

import ucp
from tests.share.made import check, exported, pool, size, source, tensors
from ucp.errors import CorruptError, UsageError
from ucp.format.documents import root_digest
from ucp.format.pool import content_name
from ucp.mapping import read_source
from ucp.run.compare import compare
from ucp.run.verify import verify
from ucp.store import LocalStore
from ucp.store.mounted import MountedStore
from ucp.testing.faults import crashes, placed
from ucp.testing.watched import Counted


@pytest.mark.parametrize("processes", [False, True])
def test_what_is_equal_is_stored_once(tmp_path: Path, processes: bool) -> None:
    run = exported(tmp_path, 1, 2, 3, processes=processes)
    for step in (1, 2, 3):
        check(run / f"step-{step}", step)
    assert len(pool(run)) == 2 + 3
    assert all(content_name((run / "shared" / name).read_bytes()) == name for name in pool(run))
    assert not list(run.rglob("c/0*"))
    assert not list((run / "shared" / "writers").glob("*"))


def test_storage_of_repeated_exports(tmp_path: Path) -> None:
    run = exported(tmp_path, 1, 2, 3, 4)
    for step in (1, 2, 3, 4):
        ucp.convert(source(tmp_path, step), str(tmp_path / "plain" / f"step-{step}"))
    frozen = sum(array.nbytes for states in list(tensors(1).values())[:2] for array in states.values())
    assert size(tmp_path / "plain") - size(run) > 3 * frozen


def test_a_complete_one_is_known_again_and_an_interrupted_one_goes_on(tmp_path: Path) -> None:
    run = exported(tmp_path, 1)
    assert ucp.convert(source(tmp_path, 1), str(run / "step-1"), share=True).already_done
    with pytest.raises(UsageError, match="another checkpoint"):
        ucp.convert(source(tmp_path, 2), str(run / "step-1"), share=True)
    ucp.convert(source(tmp_path, 2), str(run / "step-1"), share=True, overwrite=True)
    check(run / "step-1", 2)
    assert not (run / "step-1" / ".ucp-journal").exists()


def test_killed_at_every_operation_it_resumes(tmp_path: Path) -> None:
    run = exported(tmp_path, 1)
    url, whole = source(tmp_path, 2), tmp_path / "whole"
    shutil.copytree(run, whole)
    points = 0

    def work(fault):
        with placed(run=fault.around(LocalStore(str(run)))):
            ucp.convert(url, "placed://run/step-2", share=True, workers=1)

    for crash in crashes(work, step=3):
        points += 1
        check(run / "step-1", 1)
        if (run / "step-2" / "zarr.json").exists():
            check(run / "step-2", 2)
        with placed(run=LocalStore(str(run))):
            ucp.convert(url, "placed://run/step-2", share=True, workers=1)
        check(run / "step-2", 2)
        left = [path for path in (run / "step-2").rglob("*") if ".ucp-journal" in str(path) or path.suffix == ".tmp"]
        assert not left, crash.at
        shutil.rmtree(run)
        shutil.copytree(whole, run)
    assert points > 15


def test_zarr_clients_find_no_array_rather_than_zeros(tmp_path: Path) -> None:
    run = exported(tmp_path, 1)
    group = zarr.open_group(str(run / "step-1"), mode="r")
    for name in ("base.0", "tensors/base.0", "tensors/adapter"):
        with pytest.raises(KeyError):
            group[name]
    assert list(group["tensors"].arrays()) == []
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{run / 'step-1' / 'tensors' / 'base.0'}/"}}
    with pytest.raises(ValueError, match=r"NOT_FOUND|not found"):
        tensorstore.open(spec).result()


def test_it_is_like_any_other_checkpoint(tmp_path: Path) -> None:
    run = exported(tmp_path, 1)
    url = str(run / "step-1")
    side, plain = read_source(url), read_source(source(tmp_path, 1))
    assert verify(*side, deep=True).ok
    assert compare(side, plain, training_state=True, workers=1, on_progress=None).ok
    assert isinstance(side[1], MountedStore)
    assert [entry.path for entry in side[1].entries() if entry.path in side[0].objects] == sorted(side[0].objects)
    counted = Counted(side[1])
    assert verify(side[0], counted, deep=True).ok
    assert counted.bytes_read >= side[0].nbytes
    ucp.convert(url, str(tmp_path / "again"))
    check(tmp_path / "again", 1)
    ucp.convert(url, str(run / "again"), share=True)
    assert len(pool(run)) == 3, "the same objects again"


def test_missing_and_damaged_objects_are_found(tmp_path: Path) -> None:
    run = exported(tmp_path, 1)
    side = read_source(str(run / "step-1"))
    for name in pool(run):
        path = run / "shared" / name
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        found = verify(*side, deep=True).findings
        assert {finding.where for finding in found} == {f"shared/{name}"}, found
        path.write_bytes(data[:-1])
        with pytest.raises(CorruptError, match=f"shared/{name}"):
            ucp.open(str(run / "step-1"))
        path.unlink()
        with pytest.raises(CorruptError, match="missing"):
            ucp.open(str(run / "step-1"))
        path.write_bytes(data)


def test_an_object_of_another_content_is_found(tmp_path: Path) -> None:
    """Whose digests are right, but whose name is not that of its content."""
    run = exported(tmp_path, 1)
    path = run / "step-1" / "zarr.json"
    doc = json.loads(path.read_bytes())
    row = doc["attributes"]["ucp"]["tensors"][0]["arrays"][0]["objects"][0]
    (run / "shared" / row["shared"]).rename(run / "shared" / ("0" * 64))
    row["shared"] = "0" * 64
    doc["attributes"]["ucp"]["crc32c"] = root_digest(doc)
    path.write_text(json.dumps(doc))
    found = verify(*read_source(str(run / "step-1")), deep=True)
    assert [(finding.kind, finding.where) for finding in found.findings] == [("shared", f"shared/{'0' * 64}")]


@pytest.mark.parametrize("name", ["../../x", "a" * 63, "A" * 64, "a" * 64 + "/", 7, None, ""])
def test_names_that_are_none_are_refused(tmp_path: Path, name: object) -> None:
    run = exported(tmp_path, 1)
    path = run / "step-1" / "zarr.json"
    doc = json.loads(path.read_bytes())
    doc["attributes"]["ucp"]["tensors"][0]["arrays"][0]["objects"][0]["shared"] = name
    doc["attributes"]["ucp"]["crc32c"] = root_digest(doc)
    path.write_text(json.dumps(doc))
    with pytest.raises(CorruptError, match="no name of a shared object"):
        ucp.open(str(run / "step-1"))


def test_what_cannot_share_says_so(tmp_path: Path) -> None:
    url = source(tmp_path, 1)
    with pytest.raises(UsageError, match="share nothing"):
        ucp.convert(url, str(tmp_path / "run" / "x"), to="torch", share=True)
    with pytest.raises(UsageError, match="keeps what its checkpoints share"):
        ucp.convert(url, str(tmp_path / "run" / "shared"), share=True)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]])
def test_a_damaged_pool_object_is_put_right_by_who_has_its_bytes(tmp_path: Path, damage, caplog) -> None:
    """Nothing new refers to what is damaged, and what refers to it already is whole again."""
    run = exported(tmp_path, 1)
    sound = {name: (run / "shared" / name).read_bytes() for name in pool(run)}
    for name, data in sound.items():
        (run / "shared" / name).write_bytes(damage(data))
    ucp.convert(source(tmp_path, 2), str(run / "step-2"), share=True)
    assert "was damaged, and is written again" in caplog.text
    check(run / "step-2", 2)
    again = {name for name in pool(run) if name in sound and (run / "shared" / name).read_bytes() == sound[name]}
    assert len(again) == 2, "the two that both hold"


def test_arrays_of_the_sizes_that_objects_are_cut_at(tmp_path: Path) -> None:
    """Several objects for one tensor, of which some are shared with another checkpoint."""
    run, rows = tmp_path / "run", np.arange(40_000, dtype="f4").reshape(400, 100)
    from tests.format.build import universal

    for step, change in ((1, 0), (2, 399)):
        changed = rows.copy()
        changed[change] += 1
        url = universal(tmp_path / f"s{step}", {"w": {"value": changed}}).url
        ucp.convert(url, str(run / f"step-{step}"), share=True, shard_bytes=20_000)
        with ucp.open(str(run / f"step-{step}")) as found:
            assert np.array_equal(found["w"]["value"][...].numpy(), changed)
    objects = json.loads((run / "step-1" / "zarr.json").read_bytes())["attributes"]["ucp"]["tensors"][0]["arrays"][0]
    assert len(pool(run)) == len(objects["objects"]) + 2
