from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.train.manager.jobs import build, differing, fingerprint, run, train_step, uninterrupted
from ucp.train.manager import CheckpointManager


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def steps_in(url: str) -> list[int]:
    return [saved.step for saved in CheckpointManager(url).saved]


def damage(url: str, step: int) -> None:
    (shard, *_) = sorted(Path(url, f"step-{step:08}", "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)


def test_a_run_starts_saves_what_is_due_and_goes_on_as_if_uninterrupted(url: str) -> None:
    first, last, _ = run(url, 5, every=2)
    assert (first, last) == (0, 5)
    assert steps_in(url) == [2, 4]
    first, last, state = run(url, 7, every=2)
    assert (first, last) == (4, 7)
    assert not differing(state, uninterrupted(7))


def test_what_is_kept(url: str) -> None:
    run(url, 9, every=1, keep_latest=2, keep_every=4, best=("loss", "max"))
    manager = CheckpointManager(url, best=("loss", "max"))
    losses = {saved.step: saved.metrics["loss"] for saved in manager.saved}
    assert {4, 8, 9} <= losses.keys()
    assert len(losses) in (3, 4)
    assert manager.best is not None
    assert manager.best.metrics["loss"] == max(losses.values())
    assert manager.latest is not None
    assert (manager.latest.step, manager.latest.url) == (9, f"{url}/step-00000009")
    assert sorted(os.listdir(url)) == sorted(f"step-{s:08}{end}" for s in losses for end in ("", ".json"))


def test_another_process_reads_latest_and_best_from_disk(url: str) -> None:
    run(url, 4, every=2)
    program = (
        "import sys, ucp; m = ucp.CheckpointManager(sys.argv[1], best=('loss', 'min'))\n"
        "print(m.latest.step, ucp.open(m.latest.url).step, m.best.step)"
    )
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, check=True)
    best = min(CheckpointManager(url).saved, key=lambda saved: saved.metrics["loss"])
    assert done.stdout.split() == ["4", "4", str(best.step)]


def test_on_a_store_without_rename_or_links(tmp_path: Path) -> None:
    import fsspec

    run("memory://manager-run", 4, every=1, keep_latest=2)
    assert steps_in("memory://manager-run") == [3, 4]
    first, _, state = run("memory://manager-run", 5)
    assert first == 4
    assert not differing(state, uninterrupted(5))
    fsspec.filesystem("memory").rm("/manager-run", recursive=True)


def test_an_incomplete_one_is_named_never_taken_and_replaced(url: str, caplog: pytest.LogCaptureFixture) -> None:
    run(url, 4, every=2)
    (Path(url) / "step-00000004" / "ucp.json").unlink()
    (Path(url) / "step-00000004" / "shards" / "rank-00007-0.safetensors").write_bytes(b"of another world")
    model, optimizer = build()
    with caplog.at_level(logging.INFO, "ucp"), CheckpointManager(url) as manager:
        assert manager.incomplete == [f"{url}/step-00000004"]
        resumed = manager.resume((model, optimizer))
        assert resumed is not None
        assert resumed.step == 2
        assert resumed.incomplete == (f"{url}/step-00000004",)
        with pytest.raises(ucp.NotFoundError, match="incomplete"):
            manager.resume((model, optimizer), step=4)
    assert "resumed step 2 from" in caplog.text
    assert "step-00000004 is incomplete" in caplog.text
    run(url, 4, every=2)
    assert steps_in(url) == [2, 4]
    assert len(list((Path(url) / "step-00000004" / "shards").iterdir())) == 1


def test_folders_of_somebody_else_are_never_deleted_nor_written_to(url: str) -> None:
    for step in (1, 5):
        Path(url, f"step-{step:08}").mkdir(parents=True)
        Path(url, f"step-{step:08}", "__0_0.distcp").write_bytes(b"of another saver")
    first, last, _ = run(url, 4, every=2, keep_latest=1)
    assert (first, last) == (0, 4)
    with pytest.raises(ucp.ConflictError, match="step 5 is to be saved where files lie"):
        run(url, 5, every=5, keep_latest=1)
    assert steps_in(url) == [4]
    for step in (1, 5):
        assert os.listdir(Path(url, f"step-{step:08}")) == ["__0_0.distcp"]


def test_a_new_run_says_that_there_is_only_an_incomplete_one(url: str, caplog: pytest.LogCaptureFixture) -> None:
    run(url, 2, every=2)
    (Path(url) / "step-00000002" / "ucp.json").unlink()
    assert run(url, 3, every=2)[0] == 0
    assert "no complete checkpoint, a new run begins" in caplog.text
    assert "step-00000002" in caplog.text
    assert steps_in(url) == [2]


def test_a_damaged_newest_one_is_an_error_with_a_remedy(url: str) -> None:
    run(url, 6, every=2)
    damage(url, 6)
    with (
        CheckpointManager(url) as manager,
        pytest.raises(ucp.CorruptError, match="step-00000006 cannot be resumed") as e,
    ):
        manager.resume(build())
    assert "damaged='older'" in str(e.value.hint)
    assert "step-00000004" in str(e.value.hint)


def test_by_option_the_one_before_is_taken_and_the_damaged_one_is_out_of_the_way(url: str) -> None:
    run(url, 6, every=2)
    damage(url, 6)
    model, optimizer = build(3)
    with CheckpointManager(url, every=1) as manager:
        resumed = manager.resume((model, optimizer), damaged="older")
        assert resumed is not None
        assert resumed.step == 4
        assert [at for at, _ in resumed.damaged] == [f"{url}/step-00000006"]
        assert "which is damaged" in str(resumed)
        assert not differing(fingerprint(model, optimizer), uninterrupted(4))
        assert [saved.step for saved in manager.saved] == [2, 4]
        train_step(model, optimizer, 5)
        manager.step(5, (model, optimizer))
    first, _, state = run(url, 6, every=2)
    assert first == 5
    assert not differing(state, uninterrupted(6))
    assert steps_in(url) == [2, 4, 5, 6]
    ucp.open(f"{url}/step-00000006").state_dict()


def test_all_damaged(url: str) -> None:
    run(url, 4, every=2)
    damage(url, 2)
    damage(url, 4)
    with CheckpointManager(url) as manager, pytest.raises(ucp.ContentError, match="every checkpoint"):
        manager.resume(build(), damaged="older")


def test_a_target_that_does_not_fit_is_no_damage(url: str) -> None:
    run(url, 4, every=2)
    with CheckpointManager(url) as manager, pytest.raises(ucp.FitError):
        manager.resume(torch.nn.Linear(3, 3), damaged="older")


def test_an_earlier_step_by_choice_begins_another_history(url: str) -> None:
    run(url, 6, every=2)
    first, last, _ = run(url, 5, resume={"step": 2}, every=1, keep_latest=2)
    assert (first, last) == (2, 5)
    assert steps_in(url) == [4, 5]
    assert ucp.open(f"{url}/step-00000006").step == 6, "what was put aside lies there until the run gets there"
    assert run(url, 6, every=1, keep_latest=2)[0] == 5
    assert steps_in(url) == [5, 6]


def test_what_was_put_aside_can_be_taken_back(url: str) -> None:
    run(url, 6, every=2)
    assert run(url, 2, resume={"step": 2})[0] == 2
    assert steps_in(url) == [2]
    assert run(url, 6, resume={"step": 6})[0] == 6
    assert steps_in(url) == [2, 6]


def test_what_was_put_aside_is_not_taken_for_a_step_that_came_from_elsewhere(url: str) -> None:
    run(url, 6, every=2)
    run(url, 2, resume={"step": 2})
    with CheckpointManager(url, every=4) as manager:
        manager.went_on(6)
    assert steps_in(url) == [2]


def test_a_new_run_does_not_grow_into_an_old_one(url: str) -> None:
    run(url, 4, every=2)
    with CheckpointManager(url, every=1, keep_latest=1) as manager:
        with pytest.raises(ucp.ConflictError, match="up to step 4") as caught:
            manager.step(1, build())
        assert "resume" in str(caught.value.hint)
    assert steps_in(url) == [2, 4]


def test_a_step_is_saved_once(url: str) -> None:
    state = build()
    with CheckpointManager(url, every=2) as manager:
        assert manager.step(1, state) is None
        assert manager.step(2, state) is not None
        assert manager.step(2, state) is None
        with pytest.raises(ucp.UsageError, match="not after"):
            manager.save(1, state)


def test_metrics_without_the_one_that_counts(url: str) -> None:
    with CheckpointManager(url, best=("loss", "min")) as manager, pytest.raises(ucp.UsageError, match="loss"):
        manager.save(1, build(), metrics={"los": 1.0})


def test_a_signal_saves_at_the_end_of_the_step(url: str) -> None:
    model, optimizer = build()
    before = signal.getsignal(signal.SIGUSR1)
    with CheckpointManager(url, every=100, preempt=("SIGUSR1",)) as manager:
        for step in range(1, 50):
            train_step(model, optimizer, step)
            if step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            handle = manager.step(step, (model, optimizer))
            if manager.preempted:
                break
        assert step == 3
        assert handle is not None
        assert handle.done()
        assert manager.latest is not None
        assert manager.latest.step == 3
    assert signal.getsignal(signal.SIGUSR1) == before


def test_what_was_saved_already_is_not_saved_again_at_the_end(url: str) -> None:
    state = build()
    with CheckpointManager(url, every=2) as manager:
        first = manager.step(2, state)
        assert first is not None
        manager.preempt()
        assert manager.step(2, state) is None
        assert manager.preempted
    assert steps_in(url) == [2]


def test_a_save_that_failed_before_does_not_keep_the_last_one_from_being_tried(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = build()
    Path(url).mkdir()
    Path(url, "step-00000001").write_bytes(b"a file where the folder goes")
    with CheckpointManager(url, every=1) as manager:
        manager.step(1, state)
        manager.preempt()
        manager.step(2, state)
        assert manager.preempted
    assert "the save before failed" in caplog.text
    assert steps_in(url) == [2]


def _wait_long(ready: Any) -> None:
    ready.set()
    threading.Event().wait(300)


def test_forked_children_are_ended_by_the_signal_as_ever(url: str) -> None:
    import multiprocessing

    with CheckpointManager(url, every=2) as manager:
        manager.step(1, build())
        fork = multiprocessing.get_context("fork")
        ready = fork.Event()
        child = fork.Process(target=_wait_long, args=(ready,))
        child.start()
        assert ready.wait(120)
        child.terminate()
        child.join(120)
        assert child.exitcode == -signal.SIGTERM


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The disk writes nothing until it is open."""
    from ucp.store.local_write import FileWriter

    opened, write = threading.Event(), FileWriter.write_at

    def late(self: Any, offset: int, data: Any) -> None:
        assert opened.wait(300)
        write(self, offset, data)

    monkeypatch.setattr(FileWriter, "write_at", late)
    yield opened
    opened.set()


def test_while_a_save_runs_the_next_may_be_left_out(
    url: str, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    state = build()
    with CheckpointManager(url, every=1, busy="skip") as manager:
        first = manager.step(1, state)
        assert first is not None
        assert manager.step(2, state) is None
        assert "step 2 is not saved" in caplog.text
        assert manager.latest is None
        deadline = time.monotonic() + 60
        while not manager.incomplete and time.monotonic() < deadline:
            time.sleep(0.01)  # the background thread has not begun to write
        assert manager.incomplete == [f"{url}/step-00000001"]
        gate.set()
        first.result()
        assert manager.step(3, state) is not None
    assert steps_in(url) == [1, 3]


def test_while_a_save_runs_the_next_waits(url: str, gate: threading.Event) -> None:
    state = build()
    with CheckpointManager(url, every=1) as manager:
        first = manager.step(1, state)
        assert first is not None
        assert not first.done()
        threading.Timer(0.3, gate.set).start()
        assert manager.step(2, state) is not None
        assert first.done()
    assert steps_in(url) == [1, 2]


def test_a_save_holds_what_the_state_was(url: str, gate: threading.Event) -> None:
    model, optimizer = build()
    train_step(model, optimizer, 1)
    kept = fingerprint(model, optimizer)
    with CheckpointManager(url, every=1) as manager:
        manager.step(1, (model, optimizer))
        train_step(model, optimizer, 2)
        gate.set()
    with CheckpointManager(url) as manager:
        manager.resume((model, optimizer))
    assert not differing(kept, fingerprint(model, optimizer))


@pytest.mark.parametrize("wrong", [{"every": 0}, {"busy": "drop"}, {"preempt": ["SIGKILL"]}, {"best": ("x", "least")}])
def test_arguments_that_make_no_sense(url: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ucp.UsageError):
        CheckpointManager(url, **wrong)


def test_nothing_is_done_by_making_one(url: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    CheckpointManager(url, every=1).close()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not Path(url).exists()


def test_a_checkpoint_moved_away_takes_nothing_along(url: str, tmp_path: Path) -> None:
    run(url, 2, every=2)
    shutil.move(f"{url}/step-00000002", tmp_path / "kept")
    assert ucp.open(tmp_path / "kept").step == 2
    assert steps_in(url) == []
