"""Repairs of what other frameworks wrote: from what a copy noted, what zip files digest, and replicas."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ucp
from tests.lifecycle.made import files, tensors
from tests.lifecycle.test_repair import HARM, flip, lengthen, remove, truncate
from ucp.catalog import Checksum
from ucp.errors import NotFoundError, UnsafeError
from ucp.layout import Box
from ucp.lifecycle.contents import COPIED
from ucp.lifecycle.damage import Damage
from ucp.lifecycle.form import Form
from ucp.lifecycle.origins import Search
from ucp.plan import Extent, Fragment, Key, TensorSpec
from ucp.store import LocalStore


@pytest.mark.parametrize("family", ["hf", "dcp"])
@pytest.mark.parametrize("harm", HARM)
def test_what_a_copy_noted_is_put_right(saved: Path, tmp_path: Path, family: str, harm: Callable[[Path], None]) -> None:
    """All objects, those too without which its reader sees no checkpoint."""
    there = tmp_path / "there"
    ucp.copy(str(saved / family), str(there))
    expected = files(there)
    for name in expected.keys() - {COPIED}:
        harm(there / name)
    assert ucp.repair(str(there), dry_run=True).ok is (harm is lengthen)
    report = ucp.repair(str(there), copies=[str(saved / family)])
    assert report.ok
    assert {one.path for one in report.repaired} == expected.keys() - {COPIED}
    assert files(there) == expected


def test_a_note_cannot_lead_out_of_the_folder(saved: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    ucp.copy(str(saved / "hf"), str(there))
    note = (there / COPIED).read_text()
    (there / COPIED).write_text(note.replace("config.json", "../escaped.json"))
    with pytest.raises(UnsafeError):
        ucp.repair(str(there), copies=[str(saved / "hf")])
    assert not (tmp_path / "escaped.json").exists()


def test_another_model_gives_nothing(saved: Path, tmp_path: Path) -> None:
    there, other = tmp_path / "there", tmp_path / "other"
    ucp.copy(str(saved / "hf"), str(there))
    shutil.copytree(saved / "hf", other)
    flip(other / "model.safetensors")
    flip(there / "model.safetensors")
    truncate(there / "config.json")
    before = files(there)
    report = ucp.repair(str(there), copies=[str(other)])
    assert [one.path for one in report.lost] == ["model.safetensors"]
    assert [one.path for one in report.repaired] == ["config.json"]
    assert files(there)["model.safetensors"] == before["model.safetensors"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "file"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    torch.save({f"w{n}": torch.randn(40, 30, generator=generator) for n in range(5)}, folder / "model.pt")
    return folder


def test_zip_entries_are_put_right_from_a_copy(file: Path, tmp_path: Path) -> None:
    shutil.copytree(file, tmp_path / "copy")
    expected = tensors(file)
    data = bytearray((file / "model.pt").read_bytes())
    catalog = ucp.open(str(file)).catalog
    for name in ("w1", "w4"):
        data[catalog.fragments[Key(name, "value")][0].extent.offset + 9] ^= 2
    (file / "model.pt").write_bytes(data)
    report = ucp.repair(str(file), copies=[str(tmp_path / "copy")])
    assert report.ok
    assert [one.path for one in report.repaired] == ["model.pt"]
    assert files(file) == files(tmp_path / "copy")
    assert tensors(file) == expected


def test_what_nothing_proves_is_lost(file: Path, tmp_path: Path) -> None:
    shutil.copytree(file, tmp_path / "copy")
    remove(file / "model.pt")
    with pytest.raises(NotFoundError):
        ucp.repair(str(file), copies=[str(tmp_path / "copy")])


def test_a_replica_gives_what_is_damaged(tmp_path: Path) -> None:
    store, data = LocalStore(str(tmp_path)), bytes(range(48))
    store.put("rank0", b"head" + data)
    store.put("rank1", b"another head" + data)
    key, spec = Key("norm", "value"), TensorSpec((3, 4), "float32")
    places = {"rank0": 4, "rank1": 12}
    fragments = tuple(
        Fragment(Box.whole((3, 4)), Extent.contiguous(path, at, (3, 4), "float32"), replica)
        for replica, (path, at) in enumerate(places.items())
    )
    checksums = [Checksum(path, at, 48, "crc32", zlib.crc32(data)) for path, at in places.items()]
    sizes = {path: at + 48 for path, at in places.items()}
    form = Form(
        "x", b"", "", {}, {}, {}, None, sizes, {key: spec}, {key: fragments}, lambda _: checksums, lambda _: iter(())
    )
    flip(tmp_path / "rank0")
    found = Search(store, form, (), ()).find(checksums[0])
    assert found is not None
    assert found.origin == "its replica in rank1"
    assert b"".join(found.fetch()) == data
    flip(tmp_path / "rank1")
    assert Search(LocalStore(str(tmp_path)), form, (), ()).find(checksums[0]) is None


@pytest.mark.parametrize(
    ("found", "spans", "provable"),
    [
        (10, [(2, 3)], True),
        (10, [], True),
        (5, [(5, 5)], True),
        (5, [(6, 4)], False),
        (5, [(2, 4)], False),
        (None, [(0, 4), (4, 6)], True),
        (None, [(0, 4)], False),
    ],
)
def test_bytes_without_a_digest_are_never_made_up(
    found: int | None, spans: list[tuple[int, int]], provable: bool
) -> None:
    checksums = tuple(Checksum("a", offset, length, "crc32", 0) for offset, length in spans)
    assert Damage("a", 10, found, checksums, checksums).provable is provable
