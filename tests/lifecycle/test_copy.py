"""Copies: equal bytes, each read once, resumed after any crash, and never of or over something else."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import fsspec
import pytest

import ucp
from tests.lifecycle.made import files, tensors
from ucp.errors import ConflictError, CorruptError, NotFoundError, UnsafeError, UsageError
from ucp.lifecycle.contents import COPIED, check_names, read_contents
from ucp.lifecycle.copy import copy
from ucp.run.claim import HEAD, claim_of
from ucp.store import OPENERS, LocalStore, Store, open_store
from ucp.testing.faults import Fault, crash, crashes, placed
from ucp.testing.watched import Around

FAMILIES = ["native-3", "universal-3", "hf", "dcp"]


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, saved: Path) -> Path:
    return saved / request.param


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


def without_note(found: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in found.items() if path != COPIED}


def test_a_copy_is_equal(source: Path, there: Path) -> None:
    before = files(source)
    report = copy(str(source), str(there), verify=True)
    assert without_note(files(there)) == files(source) == before
    assert tensors(there) == tensors(source)
    assert not report.already_done
    assert report.bytes_copied == report.bytes_verified == sum(map(len, before.values()))
    assert report.objects == len(before)


def test_own_digests_are_set_against_every_byte(saved: Path, there: Path) -> None:
    report = copy(str(saved / "universal-3"), str(there))
    checksums = read_contents(str(there)).checksums
    assert report.digests == sum(checksum.length > 0 for checksum in checksums) > 10


def test_a_second_copy_does_nothing_but_verify(source: Path, there: Path) -> None:
    copy(str(source), str(there))
    before = files(there)
    report = copy(str(source), str(there), verify=True)
    assert report.already_done
    assert report.bytes_copied == 0
    assert report.bytes_verified == sum(map(len, files(source).values()))
    assert files(there) == before


def test_what_lies_beside_comes_along(saved: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(saved / "native-3", source)
    (source / "README.md").write_text("about this model")
    (source / "shards" / "rank-00009-0-deadbeef.safetensors").write_text("left by a save that failed")
    copy(str(source), str(tmp_path / "there"))
    copied = files(tmp_path / "there")
    assert "README.md" in copied
    assert "shards/rank-00009-0-deadbeef.safetensors" not in copied


def test_one_file_is_copied_into_a_folder(saved: Path, there: Path) -> None:
    copy(str(saved / "hf" / "model.safetensors"), str(there), verify=True)
    assert without_note(files(there)) == {"model.safetensors": (saved / "hf" / "model.safetensors").read_bytes()}


def test_to_memory_and_back(source: Path, there: Path) -> None:
    url = f"memory://copied-{source.name}"
    try:
        copy(str(source), url, verify=True)
        copy(url, str(there), verify=True)
        assert without_note(files(there)) == files(source)
    finally:
        fsspec.filesystem("memory").rm(f"/copied-{source.name}", recursive=True)


class Counting(Around):
    """Counts how often each byte is read, and how often each object is written."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.bytes_read: dict[str, int] = {}

    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        self.bytes_read[path] = self.bytes_read.get(path, 0) + len(buffer)
        super().read_into(path, offset, buffer)


def test_each_byte_is_read_once(saved: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(LocalStore(str(saved / "native-3")))
    monkeypatch.setitem(OPENERS, "counting", lambda url: counting)
    copy("counting://", str(there))
    large = {path: size for path, size in counting.bytes_read.items() if path.startswith("shards/")}
    assert large == {path: len(data) for path, data in files(saved / "native-3").items() if path in large}
    assert large


@pytest.mark.parametrize("path", ["native-3", "universal-3"])
def test_damage_is_not_copied(saved: Path, tmp_path: Path, path: str) -> None:
    """A flipped bit in any object, and any object missing or cut short."""
    for number, name in enumerate(files(saved / path)):
        if name.startswith("ucp-conversion"):
            continue  # a note, which nothing depends on
        source, there = tmp_path / f"source-{number}", tmp_path / f"there-{number}"
        shutil.copytree(saved / path, source)
        data = bytearray((source / name).read_bytes())
        data[len(data) // 2] ^= 4
        (source / name).write_bytes(data)
        with pytest.raises((CorruptError, NotFoundError)):
            copy(str(source), str(there))
        with pytest.raises(NotFoundError):
            ucp.open(str(there))


def test_a_changing_source_is_noticed(source: Path, tmp_path: Path, there: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(source, own)
    name = max(files(own), key=lambda path: len(files(own)[path]))
    again = (own / name).read_bytes()

    def change(_: object) -> None:
        (tmp_path / "new").write_bytes(again)
        (tmp_path / "new").replace(own / name)

    with pytest.raises(CorruptError, match="changed"):
        copy(str(own), str(there), on_progress=change)
    with pytest.raises(UsageError, match="changed"):
        copy(str(own), str(there))
    copy(str(own), str(there), restart=True)
    assert without_note(files(there)) == files(own)


def test_a_destination_that_holds_something_else_is_refused(saved: Path, there: Path) -> None:
    there.mkdir()
    (there / "thesis.txt").write_text("all I have")
    for restart in (False, True):
        with pytest.raises(UsageError, match="something else"):
            copy(str(saved / "hf"), str(there), restart=restart)
    assert files(there) == {"thesis.txt": b"all I have"}


def test_another_checkpoint_is_not_replaced(source: Path, saved: Path, there: Path) -> None:
    copy(str(saved / "native-2"), str(there))
    before = files(there)
    for restart in (False, True):
        with pytest.raises(UsageError):
            copy(str(source), str(there), restart=restart)
    assert files(there) == before


def test_a_copy_that_lost_an_object_names_the_remedy(source: Path, there: Path) -> None:
    copy(str(source), str(there))
    largest = max(files(source), key=lambda path: len(files(source)[path]))
    (there / largest).unlink()
    with pytest.raises(CorruptError) as caught:
        copy(str(source), str(there))
    assert "repair" in str(caught.value.hint)


@pytest.mark.parametrize("inside", ["copy", "tokenizer/copy", "."])
def test_a_destination_inside_the_source_is_refused(saved: Path, inside: str) -> None:
    before = files(saved / "hf")
    with pytest.raises(UsageError, match="overlap"):
        copy(str(saved / "hf"), str(saved / "hf" / inside))
    with pytest.raises(UsageError, match="overlap"):
        copy(str(saved / "hf"), str(saved))
    assert files(saved / "hf") == before


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", "./a", "a/.", "a\0b", "C:/x", "a\\..\\b", ""])
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(UnsafeError):
        check_names(["fine/one", name])


class Hostile(Around):
    """A store that lists an object of a name that leads out of the folder."""

    def entries(self, prefix: str = "") -> object:
        for entry in super().entries(prefix):
            yield entry
            yield type(entry)("../../escaped", entry.size, entry.fingerprint)


def test_names_are_looked_at_before_anything_is_written(
    saved: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPENERS, "hostile", lambda url: Hostile(LocalStore(str(saved / "hf"))))
    with pytest.raises(UnsafeError, match="escaped"):
        copy("hostile://", str(there))
    assert not there.exists()


def test_two_writers_of_two_checkpoints(saved: Path, there: Path) -> None:
    """The second one is told; the first goes on and is whole."""
    begun = []

    def other(_: object) -> None:
        if not begun:
            begun.append(True)
            with pytest.raises((ConflictError, UsageError)):
                copy(str(saved / "native-2"), str(there))

    copy(str(saved / "native-3"), str(there), on_progress=other)
    assert begun
    assert files(there) == files(saved / "native-3")


@pytest.mark.parametrize(("name", "how"), [("native-3", "before"), ("native-3", "torn"), ("hf", "torn")])
def test_killed_at_every_operation(saved: Path, tmp_path: Path, name: str, how: str) -> None:
    """What is left is no checkpoint, or all of it; the next run finishes the same bytes."""
    source, there = saved / name, tmp_path / "there"

    def work(fault: Fault) -> None:
        with placed(there=fault.around(LocalStore(str(there)))):
            copy(str(source), "placed://there", workers=1)

    died = 0
    for one in crashes(work, how=how):
        died += 1
        complete = _opens(there)
        if complete:
            assert without_note(files(there)).items() >= files(source).items(), one
        report = copy(str(source), str(there), workers=1)
        assert without_note(files(there)) == files(source), one
        assert claim_of(open_store(str(there))) is None
        assert report.already_done or not complete or not read_contents(str(there)).own
        shutil.rmtree(there)
    assert died > 2 * len(files(source))


def _opens(folder: Path) -> bool:
    try:
        ucp.open(str(folder))
    except NotFoundError:
        return False
    return True


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Two objects of 96 MiB by two workers: the windows of each, and little else."""
    source = tmp_path / "source"
    source.mkdir()
    for number in (1, 2):
        header = json.dumps({f"w{number}": {"dtype": "U8", "shape": [96 << 20], "data_offsets": [0, 96 << 20]}})
        with (source / f"{number}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header.encode())
            file.truncate(8 + len(header) + (96 << 20))
    tracemalloc.start()
    try:
        report = copy(str(source), str(tmp_path / "there"), workers=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.bytes_copied > 192 << 20
    assert peak < 2 * 24 << 20


def test_a_resumed_copy_does_not_begin_anew(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    # As many operations each time, however long it takes.
    monkeypatch.setattr("ucp.lifecycle.carry._FLUSH_SECONDS", float("inf"))

    def work(fault: Fault) -> None:
        with placed(there=fault.around(LocalStore(str(there)))):
            copy(str(saved / "universal-3"), "placed://there", workers=1)

    last_put = max(one.number for one in crash(work).operations if one.name == "put")
    shutil.rmtree(there)
    assert crash(work, at=last_put).at is not None
    assert os.path.exists(there / HEAD)
    report = copy(str(saved / "universal-3"), str(there))
    assert report.resumed_objects == report.objects - 1
    assert files(there) == files(saved / "universal-3")
