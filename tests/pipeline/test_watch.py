"""What a watcher does: convert, verify, publish, prune, pass over what is damaged, and share the work."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

import ucp
from tests.pipeline.scene import check, kinds, published, save, value, watch
from ucp.errors import ConflictError, UsageError
from ucp.pipeline import Event, Settings, Watch, leases
from ucp.pipeline.control import FOLDER, dumps
from ucp.pipeline.pointer import Pointer
from ucp.pipeline.records import Record, Records
from ucp.store import LocalStore, open_store


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def destination(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def damage(folder: Path) -> None:
    """Flip one bit of the largest object."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def test_new_checkpoints_are_converted_newest_first_and_the_newest_is_published(source, destination):
    told: list[Event] = []
    for step in (9, 10, 999, 1000):
        save(source, step)
    outcome = watch(source, destination, told)
    assert outcome.kept == ["step-1000", "step-999", "step-10", "step-9"]
    assert kinds(told)[:4] == [
        "converting step-1000",
        "verifying step-1000",
        "verified step-1000",
        "published step-1000",
    ]
    assert [kind for kind in kinds(told) if kind.startswith("published")] == ["published step-1000"]
    said = published(destination)
    assert said["url"] == f"{destination}/step-1000"
    assert (said["step"], said["family"], said["check"], said["format"]) == (1000, "universal", "deep", "ucp-pointer")
    assert outcome.published.about["digest"] == said["digest"]
    for step in (9, 10, 999, 1000):
        check(destination, step)


def test_a_second_pass_does_nothing(source, destination):
    save(source, 1)
    watch(source, destination)
    told: list[Event] = []
    before = {path: path.stat().st_mtime_ns for path in Path(destination).rglob("*") if path.is_file()}
    assert watch(source, destination, told).kept == ["step-1"]
    assert not told
    assert before == {path: path.stat().st_mtime_ns for path in Path(destination).rglob("*") if path.is_file()}


def test_the_newest_are_kept_and_what_the_pointer_names_is_never_removed(source, destination):
    for step in range(1, 6):
        save(source, step)
    assert watch(source, destination, keep=2).kept == ["step-5", "step-4"]
    assert sorted(ucp_folders(destination)) == ["step-4", "step-5"]
    save(source, 6)
    told: list[Event] = []
    watch(source, destination, told, keep=2, grace=3600.0)
    assert kinds(told)[-1] == "retired step-4"
    check(destination, 4)
    # The pointer is put back to what is marked, as by hand: it stays.
    store = open_store(destination)
    said = json.loads(store.read("latest.json"))
    store.put("latest.json", dumps({**said, "name": "step-4", "digest": "other"}))
    records = Records(store)
    pruning = Watch(Settings(source, destination, keep=2))._pruning
    from ucp.pipeline.prune import prune

    prune(pruning, records.all()["step-4"])
    assert records.one("step-4").state == "verified"
    watch(source, destination, keep=2)
    assert published(destination)["name"] == "step-6"
    assert sorted(ucp_folders(destination)) == ["step-5", "step-6"]


def ucp_folders(destination: str) -> list[str]:
    return [path.name for path in Path(destination).iterdir() if path.is_dir() and not path.name.startswith(".")]


def test_what_was_marked_and_published_meanwhile_gives_way_to_another(source, destination):
    """The other side of the race: whoever publishes sees the mark that came in between, and chooses again."""
    for step in (1, 2):
        save(source, step)
    watch(source, destination)
    store, records = open_store(destination), Records(open_store(destination))
    record = records.all()["step-2"]
    store.delete("latest.json")

    class Racing(Records):
        def one(self, name: str) -> Record | None:
            now = super().one(name)
            if name == "step-2" and now is not None and now.state == "verified":
                assert self.change(now.as_state("retired", 1.0), was=now)
                return super().one(name)
            return now

    changed = Pointer(store, "latest.json").publish(record, Racing(store))
    assert changed.name == published(destination)["name"] == "step-1"


def test_a_damaged_source_is_told_passed_over_and_tried_again_when_it_changes(source, destination):
    for step in (1, 2, 3):
        save(source, step)
    damage(Path(source) / "step-3")
    told: list[Event] = []
    outcome = watch(source, destination, told)
    assert outcome.kept == ["step-2", "step-1"]
    assert published(destination)["name"] == "step-2"
    [failure] = outcome.failed
    assert (failure.name, failure.code, failure.exit_code, failure.attempts) == ("step-3", "corrupt", 6, 1)
    assert "failed step-3" in kinds(told)
    told.clear()
    [again] = watch(source, destination, told).failed
    assert again.attempts == 1
    assert 0 < again.retry_in <= 60
    assert not told, "it is not tried again at once"
    store, path = open_store(destination), f"{FOLDER}records/step-3.json"
    store.put(path, dumps({**json.loads(store.read(path)), "since": 0.0}))
    [later] = watch(source, destination).failed
    assert later.attempts == 2
    assert later.retry_in == 120
    damage(Path(source) / "step-3")  # the same bit flips back
    assert watch(source, destination).kept == ["step-3", "step-2", "step-1"]
    assert published(destination)["name"] == "step-3"
    check(destination, 3)


def test_folders_that_are_no_checkpoints_yet_wait(source, destination):
    save(source, 1)
    folder = Path(source) / "step-2"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "x").write_bytes(b"x")
    outcome = watch(source, destination)
    assert (outcome.kept, outcome.incomplete, outcome.failed) == (["step-1"], ["step-2"], [])
    (folder / "shards" / "x").unlink()
    save(source, 2)
    assert watch(source, destination).kept == ["step-2", "step-1"]


def test_names_that_are_taken_are_left_alone(source, destination):
    save(source, 1)
    for name in ("latest.json", ".ucp-watch", ".trash"):
        ucp.save({"weight": value(2)}, f"{source}/{name}", step=2)
    outcome = watch(source, destination)
    assert (outcome.kept, outcome.failed, published(destination)["name"]) == (["step-1"], [], "step-1")


def test_a_marker_says_what_is_ready(source, destination):
    save(source, 1)
    assert watch(source, destination, ready="_SUCCESS").kept == []
    (Path(source) / "step-1" / "_SUCCESS").touch()
    assert watch(source, destination, ready="_SUCCESS").kept == ["step-1"]


@pytest.mark.parametrize("to", ["universal", "safetensors"])
def test_a_result_that_is_damaged_is_never_published(source, destination, to, monkeypatch):
    """Whatever the form: with digests of its own, or compared with the source."""
    from ucp.run import convert

    save(source, 1)
    carry_out = convert.carry_out

    def damaging(conversion, **options):
        report = carry_out(conversion, **options)
        folder = Path(destination) / "step-1"
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[-3] ^= 4
        largest.write_bytes(data)
        return report

    monkeypatch.setattr("ucp.pipeline.make.carry_out", damaging)
    [failure] = watch(source, destination, options={"to": to}).failed
    assert failure.code == "corrupt"
    assert "deleted" in failure.hint
    assert published(destination) is None
    assert ucp_folders(destination) == []
    monkeypatch.undo()
    assert watch(source, destination, options={"to": to}).failed, "it waits"
    store, path = open_store(destination), f"{FOLDER}records/step-1.json"
    store.put(path, dumps({**json.loads(store.read(path)), "since": 0.0}))
    assert watch(source, destination, options={"to": to}).kept == ["step-1"]
    assert published(destination)["check"] == ("deep" if to == "universal" else "source")


def test_what_somebody_deletes_is_made_again_and_the_pointer_never_names_what_is_gone(source, destination):
    for step in (1, 2):
        save(source, step)
    watch(source, destination)
    import shutil

    shutil.rmtree(Path(destination) / "step-2")
    shutil.rmtree(Path(source) / "step-2")
    told: list[Event] = []
    watch(source, destination, told)
    assert kinds(told) == ["published step-1"]
    save(source, 2)
    assert watch(source, destination).kept == ["step-2", "step-1"]
    (Path(destination) / "step-2" / "zarr.json").unlink()
    told.clear()
    watch(source, destination, told)
    assert kinds(told)[0] == "pruned step-2"
    watch(source, destination)
    check(destination, 2)
    assert published(destination)["name"] == "step-2"


def test_a_lease_keeps_others_away_until_it_ends_or_its_holder_is_dead(source, destination):
    save(source, 1)
    Path(destination).mkdir()
    store = LocalStore(destination)
    held = leases.take(store, "step-1", 100.0)
    assert watch(source, destination).busy == ["step-1"]
    document = json.loads(store.read(held.path))
    for changed in ({"until": time.time() - 1}, {"until": 1e12}, {"process": [1, "0"]}, {"until": "soon"}):
        store.put(held.path, dumps({**document, **changed}))
        assert leases.take(store, "step-1", 100.0) is not None
    store.put(held.path, dumps({**document, "machine": "another", "process": [1, "0"]}))
    assert leases.take(store, "step-1", 100.0) is None
    held.renewed -= 50
    store.put(held.path, dumps({**document, "until": time.time() + 1}))
    held.renew()
    assert json.loads(store.read(held.path))["until"] > time.time() + 50
    held.release()
    assert watch(source, destination).kept == ["step-1"]


def test_two_watchers_of_the_same_prefixes_do_no_harm(source, destination):
    for step in range(1, 5):
        save(source, step)
    context = multiprocessing.get_context("forkserver")
    watchers = [context.Process(target=pass_after_pass, args=(source, destination)) for _ in range(3)]
    for process in watchers:
        process.start()
    for process in watchers:
        process.join(400)
        assert process.exitcode == 0
    outcome = watch(source, destination, keep=2)
    assert outcome.kept == ["step-4", "step-3"]
    assert published(destination)["name"] == "step-4"
    check(destination, 4)
    check(destination, 3)
    assert sorted(ucp_folders(destination)) == ["step-3", "step-4"]


def pass_after_pass(source: str, destination: str) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        outcome = watch(source, destination, keep=2)
        assert not outcome.failed, outcome.failed
        if not outcome.busy and len(outcome.kept) == 2:
            return
        time.sleep(0.1)
    raise AssertionError("busy for ever")


def test_a_destination_belongs_to_one_pipeline(source, destination, tmp_path):
    save(source, 1)
    watch(source, destination)
    with pytest.raises(UsageError, match="is the destination of a pipeline with to universal, not hf"):
        watch(source, destination, options={"to": "hf"})
    with pytest.raises(UsageError, match="with source"):
        watch(str(tmp_path / "another"), destination)
    with pytest.raises(UsageError, match="overlap"):
        watch(source, f"{source}/out")
    with pytest.raises(UsageError, match="keep=0"):
        watch(source, destination, keep=0)
    with pytest.raises(UsageError, match="no path of a pointer"):
        watch(source, destination, pointer=f"{FOLDER}x.json")


def test_records_and_pointers_that_are_damaged_are_found_out_again(source, destination):
    save(source, 1)
    watch(source, destination)
    store = open_store(destination)
    store.put("latest.json", b"{")
    store.put(f"{FOLDER}records/step-1.json", b"[]")
    told: list[Event] = []
    watch(source, destination, told)
    assert kinds(told) == ["converting step-1", "verifying step-1", "verified step-1", "published step-1"]
    assert published(destination)["step"] == 1


def test_another_process_at_work_on_a_result_is_no_failure(source, destination):
    save(source, 1)
    with LocalStore(f"{destination}/step-1").exclusive():
        outcome = watch(source, destination)
    assert (outcome.busy, outcome.failed) == (["step-1"], [])


def test_passes_go_on_until_they_are_stopped(source, destination):
    save(source, 1)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            save(source, 2)
        else:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Watch(Settings(source, destination)).run(every=3.0, sleep=sleep)
    assert slept == [3.0, 3.0]
    assert published(destination)["name"] == "step-2"


def test_conflicts_of_replicas_are_failures(source, destination, monkeypatch):
    save(source, 1)

    def disagree(*_, **__):
        raise ConflictError("two replicas differ")

    monkeypatch.setattr("ucp.pipeline.make.carry_out", disagree)
    [failure] = watch(source, destination).failed
    assert (failure.code, failure.exit_code) == ("conflict", 6)


@pytest.mark.parametrize("form", ["native", "universal"])
def test_a_checkpoint_is_no_prefix(source, destination, form):
    ucp.save({"weight": value(1)}, f"{source}/step-1", step=1, form=form)
    with pytest.raises(UsageError, match="is a checkpoint"):
        watch(f"{source}/step-1", destination)
    assert not Path(destination).exists()
