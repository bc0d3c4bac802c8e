"""Conversions under bad luck: damage, deletion, dying workers, two at a time; and reports that tell the truth."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

import ucp.converter
from tests.cli import shards
from ucp.errors import ConflictError, CorruptError, InterruptedRunError, StorageError, UsageError
from ucp.plan import Plan
from ucp.run.convert import RECORD, Conversion, carry_out, convert, prepare
from ucp.run.journal import FOLDER
from ucp.store import LocalStore

HEAD = f"{FOLDER}plan.json"


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setattr(ucp.converter, "_entries", shards.entries)


@pytest.fixture
def source(tmp_path) -> Path:
    rng = np.random.default_rng(1)
    arrays = {f"w{n}": rng.standard_normal((n + 3, 5)).astype(np.float32) for n in range(8)}
    return shards.write(tmp_path / "source", arrays)


@pytest.fixture
def there(tmp_path) -> Path:
    return tmp_path / "there"


def prepared(source: Path, there: Path, **options) -> Conversion:
    return prepare(str(source), str(there), to="shards", **options)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def after(objects: int, act: Callable[[], None]) -> Callable[[object], None]:
    """An `on_progress` that acts once, when so many objects are done."""
    acted = []

    def on_progress(progress) -> None:
        if progress.objects_done >= objects and not acted:
            acted.append(1)
            act()

    return on_progress


def interrupt() -> None:
    raise KeyboardInterrupt


def cut_short(source: Path, there: Path) -> None:
    with pytest.raises(InterruptedRunError):
        carry_out(prepared(source, there), workers=1, on_progress=after(5, interrupt))
    assert not (there / "index.json").exists()


@pytest.fixture
def moved(monkeypatch) -> dict[str, int]:
    """Bytes of data that the process really read and wrote, counted where they pass."""
    count = {"read": 0, "written": 0}
    read_into, create, put = LocalStore.read_into, LocalStore.create, LocalStore.put

    def reading(self, path, offset, buffer):
        if path.endswith(".bin"):
            count["read"] += len(buffer)
        read_into(self, path, offset, buffer)

    def creating(self, path, size):
        count["written"] += size
        return create(self, path, size)

    def putting(self, path, data, **options):
        if not path.startswith(FOLDER):
            count["written"] += len(data)
        put(self, path, data, **options)

    monkeypatch.setattr(LocalStore, "read_into", reading)
    monkeypatch.setattr(LocalStore, "create", creating)
    monkeypatch.setattr(LocalStore, "put", putting)
    return count


def test_a_report_is_what_passed_through_the_store(source, there, moved):
    cost = prepared(source, there).plan.cost
    report = convert(str(source), str(there), to="shards", workers=1)
    assert report.bytes_read == cost.bytes_read
    assert report.bytes_checked == cost.bytes_checked
    assert report.bytes_read + report.bytes_checked == moved["read"]
    assert report.bytes_written == moved["written"] > cost.bytes_written


def test_a_resumed_run_reports_its_own_bytes(source, there, moved):
    cut_short(source, there)
    moved |= {"read": 0, "written": 0}
    report = carry_out(prepared(source, there), workers=1)
    assert report.resumed_objects >= 5
    assert report.bytes_read + report.bytes_checked == moved["read"]
    assert report.bytes_written == moved["written"]
    assert report.objects == 16
    again = carry_out(prepared(source, there))
    assert (again.already_done, again.bytes_read, again.bytes_written) == (True, 0, 0)


@pytest.mark.parametrize("head", [b'{"finger', b"[1]", b"{}", b"\xff\xfe", b'{"version": 99, "fingerprint": "x"}'])
def test_a_journal_that_cannot_be_read_asks_for_restart(source, there, head):
    cut_short(source, there)
    (there / HEAD).write_bytes(head)
    with pytest.raises(UsageError) as caught:
        prepared(source, there)
    assert "--restart" in caught.value.hint
    report = carry_out(prepared(source, there, restart=True))
    assert report.resumed_objects == 0
    convert(str(source), str(there.parent / "fresh"), to="shards")
    assert files(there) == files(there.parent / "fresh")


def test_a_newer_journal_of_the_same_plan_is_not_resumed(source, there):
    cut_short(source, there)
    head = json.loads((there / HEAD).read_text())
    (there / HEAD).write_text(json.dumps({**head, "version": head["version"] + 1}))
    with pytest.raises(UsageError):
        prepared(source, there)


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def renumbered(data: bytes) -> bytes:
    return data.replace(b"[[0", b"[[1")


@pytest.mark.parametrize("change", [halved, renumbered, bytes.upper])
def test_damaged_journal_lines_are_done_again(source, there, change):
    """A truncated line, a changed number and garbage: none of it may reach the checkpoint's digests."""
    cut_short(source, there)
    (part, *_) = sorted((there / FOLDER).glob("*.jsonl"))
    part.write_bytes(change(part.read_bytes()))
    carry_out(prepared(source, there))
    convert(str(source), str(there.parent / "fresh"), to="shards")
    assert files(there) == files(there.parent / "fresh")


def test_what_a_killed_put_left_is_removed(source, there):
    cut_short(source, there)
    (there / "index.json.123-456.tmp").write_bytes(b"{")
    carry_out(prepared(source, there))
    assert not list(there.rglob("*.tmp"))
    assert not (there / FOLDER).exists()


def test_of_two_conversions_prepared_together_the_second_finds_the_first_ones_work(source, there):
    """Rewriting objects under a root would make half-written ones look complete."""
    first, second = prepared(source, there), prepared(source, there, restart=True)
    carry_out(first)
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    assert carry_out(second).already_done
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before


def test_preparing_a_restart_touches_nothing_and_a_running_conversion_keeps_it_out(source, other, there):
    """The files to throw away may be those of a conversion that runs."""
    said = []

    def meanwhile() -> None:
        rival = prepared(other, there, restart=True)
        with pytest.raises(ConflictError, match="another process"):
            carry_out(rival)
        said.append(1)

    carry_out(prepared(source, there), workers=1, on_progress=after(3, meanwhile))
    assert said
    convert(str(source), str(there.parent / "fresh"), to="shards")
    assert files(there) == files(there.parent / "fresh")


@pytest.fixture
def other(tmp_path) -> Path:
    return shards.write(tmp_path / "other", {"v": np.ones((4, 4), np.float32)})


def test_restart_throws_away_all_of_the_other(source, other, there):
    cut_short(source, there)
    with pytest.raises(UsageError, match="unfinished"):
        prepared(other, there)
    carry_out(prepared(other, there, restart=True))
    assert sorted(files(there)) == ["data/v.exp_avg.bin", "data/v.value.bin", "index.json"]


def test_objects_deleted_while_converting_are_an_error_and_no_checkpoint(source, there):
    def meanwhile() -> None:
        next(iter((there / "data").iterdir())).unlink()

    with pytest.raises(StorageError, match="gone"):
        carry_out(prepared(source, there), workers=1, on_progress=after(5, meanwhile))
    assert not (there / "index.json").exists()
    carry_out(prepared(source, there))
    convert(str(source), str(there.parent / "fresh"), to="shards")
    assert files(there) == files(there.parent / "fresh")


def test_objects_lost_after_completion_are_an_error(source, there):
    carry_out(prepared(source, there))
    (there / "data" / "w3.value.bin").unlink()
    with pytest.raises(CorruptError, match="w3"):
        prepared(source, there)


@pytest.mark.parametrize("record", [b'{"finger', b"[1]", b"\xff", None])
def test_a_complete_result_without_a_readable_record_is_left_alone(source, there, record):
    carry_out(prepared(source, there))
    (there / RECORD).unlink() if record is None else (there / RECORD).write_bytes(record)
    before = files(there)
    for restart in (False, True):
        with pytest.raises(UsageError, match="already holds"):
            prepared(source, there, restart=restart)
    assert files(there) == before


def test_other_options_are_another_conversion(source, there):
    carry_out(prepared(source, there))
    for options in ({"read_options": {"frozen": "w*"}}, {"check": False}):
        with pytest.raises(UsageError, match="already holds"):
            prepared(source, there, **options)


def test_a_file_that_an_option_names_may_say_something_else_by_now(tmp_path, there):
    """The order of an optimizer's parameters, say, after it was found to be wrong."""
    first, second = torch.ones(4, 4), torch.zeros(4, 4)
    state = {number: {"exp_avg": tensor} for number, tensor in enumerate((first, second))}
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    torch.save({"model": {"a": first, "b": second}, "optimizer": optimizer}, tmp_path / "job.pt")
    names = tmp_path / "order.txt"
    for order in ("a\nb\n", "b\na\n"):
        names.write_text(order)
        if order.startswith("b"):
            with pytest.raises(UsageError, match="already holds"):
                prepare(str(tmp_path / "job.pt"), str(there), read_options={"order": str(names)})
        else:
            convert(str(tmp_path / "job.pt"), str(there), read_options={"order": str(names)})


def test_a_source_that_changed_is_not_resumed(source, there):
    cut_short(source, there)
    data = (source / "rank1.bin").read_bytes()
    (source / "rank1.bin").write_bytes(data)
    with pytest.raises(UsageError, match="changed"):
        prepared(source, there)


def test_a_rewrite_that_keeps_size_and_time_is_noticed(source, there):
    cut_short(source, there)
    before = (source / "copies.bin").stat()
    data = bytearray((source / "copies.bin").read_bytes())
    data[0] ^= 1
    (source / "copies.bin").write_bytes(data)
    os.utime(source / "copies.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UsageError, match="changed"):
        prepared(source, there)


def test_a_file_in_the_way(source, there):
    there.write_text("mine")
    for destination in (there, there / "below"):
        with pytest.raises(UsageError, match="in the way"):
            carry_out(prepared(source, destination))
    assert there.read_text() == "mine"


def test_links_do_not_hide_that_the_destination_is_in_the_source(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    for destination in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(UsageError, match="overlap"):
            prepared(source, destination)


@dataclass(frozen=True)
class Deadly(shards.Raw):
    """A frame whose first writer is killed, as the system does when memory runs out."""

    mark: str = ""

    def literals(self):
        if not os.path.exists(self.mark):
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return ()


def test_a_killed_worker_is_an_error_that_says_how_to_go_on(source, there, tmp_path):
    conversion = prepared(source, there)
    last = conversion.plan.tasks[-1]
    deadly = replace(last, frame=Deadly(size=last.size, mark=str(tmp_path / "mark")))
    conversion = replace(conversion, plan=Plan.of([*conversion.plan.tasks[:-1], deadly]))
    with pytest.raises(InterruptedRunError, match="worker process died") as caught:
        carry_out(conversion, workers=1, processes=True)
    assert "resumes" in caught.value.hint
    assert not (there / "index.json").exists()
    report = carry_out(conversion, workers=2, processes=True)
    assert report.bytes_read + report.bytes_checked > 0
    convert(str(source), str(there.parent / "fresh"), to="shards")
    assert files(there) == files(there.parent / "fresh")


@dataclass(frozen=True)
class Endless(shards.Raw):
    """A frame whose writer says which process it is and stays there."""

    mark: str = ""

    def literals(self):
        Path(self.mark).write_text(str(os.getpid()))
        time.sleep(600)
        return ()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_pool_processes_do_not_outlive_a_killed_run(source, there, tmp_path):
    """One that lived on would write into the destination while the next run does."""
    conversion, mark = prepared(source, there), tmp_path / "mark"
    task = conversion.plan.tasks[0]
    endless = replace(conversion, plan=Plan.of([replace(task, frame=Endless(size=task.size, mark=str(mark)))]))
    running = get_context("spawn").Process(target=carry_out, args=(endless,), kwargs={"processes": True})
    running.start()
    wait_until(lambda: mark.exists() and mark.read_text())
    worker = Path("/proc", mark.read_text())
    assert worker.exists()
    running.kill()
    running.join()
    wait_until(lambda: not worker.exists())


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_threads_and_processes_write_and_report_the_same(source, tmp_path):
    reports = [
        convert(str(source), str(tmp_path / f"{workers}{processes}"), to="shards", workers=workers, processes=processes)
        for workers, processes in ((1, False), (4, False), (2, True))
    ]
    assert len({(r.bytes_read, r.bytes_checked, r.bytes_written, r.objects) for r in reports}) == 1
    results = [files(tmp_path / name) for name in ("1False", "4False", "2True")]
    assert results[0] == results[1] == results[2]
