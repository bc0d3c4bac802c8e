"""Checkpoints that share objects: a copy has everything itself, a mirror shares as the run does, both can be mended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zarr

import ucp
from tests.lifecycle import made
from tests.lifecycle.made import files, tensors
from ucp.converter import read_catalog
from ucp.errors import CorruptError
from ucp.format.pool import content_name
from ucp.lifecycle.copy import copy
from ucp.lifecycle.repair import repair
from ucp.lifecycle.shelf import Shelf
from ucp.lifecycle.sync import sync
from ucp.run.verify import verify


@pytest.fixture(scope="session", params=["native", "universal"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, saved: Path) -> Path:
    """A run of two checkpoints that share what did not change."""
    run = tmp_path_factory.mktemp(f"shared-{request.param}")
    if request.param == "native":
        made.save({run / f"step-{step:08}": step for step in (2, 3)}, share=True)
    else:
        for step in (2, 3):
            ucp.convert(str(saved / f"native-{step}"), str(run / f"step-{step:08}"), share=True)
    for step in (2, 3):
        Shelf(str(run)).record(step, {})
    return run


@pytest.fixture
def run(shared: Path, tmp_path: Path) -> Path:
    shutil.copytree(shared, tmp_path / "run")
    return tmp_path / "run"


def pool(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(run / "shared").items() if len(name) == 64}


def test_a_copy_has_everything_itself(run: Path, tmp_path: Path) -> None:
    source, there = run / "step-00000003", tmp_path / "elsewhere" / "copy"
    assert pool(run)
    report = copy(str(source), str(there), verify=True)
    assert report.objects == len(files(there))
    assert not (there.parent / "shared").exists()
    expected = tensors(source)
    shutil.rmtree(run)
    assert tensors(there) == expected
    assert verify(*read_catalog(str(there)), deep=True).ok
    root = next(path for path in (there / "ucp.json", there / "zarr.json") if path.exists())
    assert '"shared"' not in root.read_text()
    if root.name == "zarr.json":
        arrays = json.loads(root.read_text())["attributes"]["ucp"]["tensors"]
        group = zarr.open_group(str(there), mode="r")
        for row in arrays:
            array = group[row["arrays"][0]["path"]]
            assert array[0].tobytes() == expected[row["name"]][row["arrays"][0]["states"][0]][1]


def test_a_second_copy_is_done(run: Path, tmp_path: Path) -> None:
    copy(str(run / "step-00000003"), str(tmp_path / "copy"))
    assert copy(str(run / "step-00000003"), str(tmp_path / "copy"), verify=True).already_done


def test_a_mirror_shares_as_the_run_does(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "mirror"
    sync(str(run), str(there), verify=True)
    assert pool(there) == pool(run)
    for step in (2, 3):
        name = f"step-{step:08}"
        assert files(there / name) == files(run / name)
        assert tensors(there / name) == tensors(run / name)
    assert sync(str(run), str(there), verify=True).copied == []
    assert not list((there / "shared").glob("writers/*"))


def test_the_pool_of_a_mirror_is_verified_and_mended(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "mirror"
    sync(str(run), str(there))
    name, *_ = pool(run)
    object_ = there / "shared" / name
    data = bytearray(object_.read_bytes())
    data[-1] ^= 1
    object_.write_bytes(data)
    sync(str(run), str(there), verify=True)
    assert content_name(object_.read_bytes()) == name
    object_.write_bytes(data)
    reports = [repair(str(there / f"step-{s:08}"), copies=[str(run / f"step-{s:08}")]) for s in (2, 3)]
    assert all(report.ok for report in reports)
    assert [one.path for report in reports for one in report.repaired] == [f"shared/{name}"]
    assert content_name(object_.read_bytes()) == name
    object_.unlink()
    sync(str(run), str(there), verify=True)
    assert pool(there) == pool(run)


def test_what_the_pool_of_a_mirror_has_lost_is_put_back(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "mirror"
    sync(str(run), str(there))
    (there / "shared" / min(pool(run))).unlink()
    report = sync(str(run), str(there))
    assert len(report.mended) == 1
    assert sorted(report.mended + report.present) == [2, 3]
    assert pool(there) == pool(run)
    assert not list((there / "shared").glob("writers/*"))
    assert sync(str(run), str(there)).present == [3, 2]


def test_damage_in_the_pool_is_not_copied(run: Path, tmp_path: Path) -> None:
    for name in pool(run):
        object_ = run / "shared" / name
        data = bytearray(object_.read_bytes())
        data[len(data) // 2] ^= 1
        object_.write_bytes(data)
    with pytest.raises(CorruptError):
        copy(str(run / "step-00000003"), str(tmp_path / "copy"))
    with pytest.raises(CorruptError):
        sync(str(run), str(tmp_path / "mirror"))


def test_a_shared_object_is_mended_from_a_copy_that_shares_nothing(run: Path, tmp_path: Path) -> None:
    copy(str(run / "step-00000003"), str(tmp_path / "copy"))
    before = pool(run)
    for name in before:
        (run / "shared" / name).unlink()
    assert repair(str(run / "step-00000003"), copies=[str(tmp_path / "copy")]).ok
    assert pool(run).items() <= before.items()
    assert tensors(run / "step-00000003") == tensors(tmp_path / "copy")
