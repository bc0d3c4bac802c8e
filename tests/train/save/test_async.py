"""Saving while training goes on: snapshots are those of one moment; what fails says so and leaves the rest whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ucp
from tests.support.gloo import forkserver, spawn
from tests.train.save import jobs
from ucp.errors import ConflictError, NotFoundError, UsageError
from ucp.train.save import async_save, native, save
from ucp.train.save.job import Job


@pytest.mark.parametrize("wait", [True, False], ids=["wait", "no-wait"])
def test_what_changes_after_staging_is_in_no_checkpoint(tmp_path, wait) -> None:
    for reports in spawn(jobs.mutate_after_staged, 2, str(tmp_path), wait):
        assert reports == [(1, 61, 2), (2, 61, 2)]
    assert [jobs.expected(str(tmp_path / str(step)), 2, step) for step in (1, 2)] == [True, True]


def test_every_step_of_training_is_saved_as_it_was(tmp_path) -> None:
    spawn(jobs.steps_of_training, 2, str(tmp_path))
    for step, truth in enumerate(torch.load(tmp_path / "truth.pt"), 1):
        ckpt = ucp.open(str(tmp_path / str(step)))
        assert ckpt.step == step
        for label, wanted in truth.items():
            name, _, state = label.removesuffix("]").rpartition("[")
            assert torch.equal(ckpt[name][state][...], wanted), label


def test_nobody_waits_for_others_once_the_layout_is_known(tmp_path) -> None:
    first, again, changed, known = zip(*spawn(jobs.count_rounds, 2, str(tmp_path)), strict=True)
    assert first == ([True, False],) * 2
    assert again == changed == known == ([False, False],) * 2


def test_a_layout_that_changes_on_one_rank_is_saved_as_it_is(tmp_path) -> None:
    assert spawn(jobs.one_rank_changes, 2, str(tmp_path)) == [[None, None, None]] * 2
    assert [jobs.value(str(tmp_path / number), "more") for number in "12"] == [{0, 1, 2, 3, 4}] * 2
    assert jobs.expected_names(str(tmp_path / "1")) == jobs.expected_names(str(tmp_path / "0")) | {"more"}


def test_what_nobody_staged_fails_once_and_is_known_from_then_on(tmp_path) -> None:
    for first, second in spawn(jobs.one_rank_drops, 2, str(tmp_path)):
        assert first[0] == "ConflictError"
        assert "no rank has staged all of it" in first[1]
        assert second is None
    assert not (tmp_path / "0" / "ucp.json").exists()
    assert ucp.open(str(tmp_path / "1")).keys() == {f"w{i}" for i in range(4)}


def test_replicas_that_differ_are_an_error_on_all_ranks(tmp_path) -> None:
    for kind, told in spawn(jobs.drifted, 3, str(tmp_path)):
        assert kind == "ConflictError"
        assert "w3[value]: ranks" in told
    assert not list((tmp_path / "ckpt").rglob("*"))


def test_what_one_rank_cannot_save_is_an_error_on_all_and_the_next_save_is_well(tmp_path) -> None:
    for kind, told in spawn(jobs.one_cannot_look, 2, str(tmp_path)):
        assert (kind, "w[odd]: a list" in told) == ("FitError", True)
    assert [ucp.open(str(tmp_path / number)).keys() for number in "02"] == [{"w"}] * 2
    assert not (tmp_path / "1").exists()


def test_what_cannot_be_sent_to_other_ranks_is_an_error_on_all(tmp_path) -> None:
    for kind, told in spawn(jobs.one_cannot_travel, 2, str(tmp_path)):
        assert (kind, "pickle" in told, "rank 1" in told) == ("UcpError", True, True)
    assert jobs.value(str(tmp_path / "1"), "w") == {1}


def test_a_rank_outside_of_the_group_is_told(tmp_path) -> None:
    inside, (kind, told) = spawn(jobs.not_in_the_group, 2, str(tmp_path))
    assert inside is None
    assert (kind, told) == ("UsageError", "this rank is not in the process group that saves")


def test_an_error_that_nobody_heard_of_is_raised_by_the_next_call(tmp_path) -> None:
    for first, second in spawn(jobs.errors_raise_later, 2, str(tmp_path)):
        assert first[0] == "ConflictError"
        assert "already holds a checkpoint" in first[1]
        assert second is None
    assert ucp.open(str(tmp_path / "third")).keys() == {"w"}


def test_by_choice_errors_do_not_stop_training(tmp_path) -> None:
    for raised, tensors in spawn(jobs.errors_warn, 2, str(tmp_path)):
        assert raised[0] == "ConflictError"
        assert tensors == 1


def test_a_full_disk_is_an_error_and_the_checkpoint_before_stays_whole(tmp_path) -> None:
    for kind, told in spawn(jobs.disk_full, 2, str(tmp_path)):
        assert kind == "StorageError"
        assert "rank-00001-0" in told
    assert not list((tmp_path / "1").rglob("*.*"))
    assert torch.equal(ucp.open(str(tmp_path / "0"))["w1.2"]["value"][...], torch.ones(30000))


def test_a_folder_that_is_removed_meanwhile_is_an_error(tmp_path) -> None:
    for kind, told in spawn(jobs.folder_removed, 2, str(tmp_path)):
        assert kind == "StorageError"
        assert f"{tmp_path}/1" in told
    assert not (tmp_path / "1" / "ucp.json").exists()
    assert ucp.open(str(tmp_path / "0")).step == 0


def alone(target, world, *args) -> list[int | None]:
    """Exit codes of ranks that nobody watches."""
    context = forkserver()
    ranks = [context.Process(target=target, args=(rank, world, *args)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(300)
        return [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("moment", ["write", pytest.param("staged", marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_is_told_by_all_others_and_there_is_no_checkpoint(tmp_path, moment) -> None:
    assert alone(jobs.killed, 3, str(tmp_path), moment) == [0, -9, 0]
    for rank in (0, 2):
        raised = (tmp_path / f"raised-{rank}").read_text()
        assert raised.count("StorageError") == 2
        assert "is gone" in raised
    for number in "12":
        with pytest.raises(NotFoundError):
            ucp.open(str(tmp_path / number))
    assert ucp.open(str(tmp_path / "0")).step == 0


def test_a_save_outlives_the_process_group(tmp_path) -> None:
    assert alone(jobs.group_is_gone, 2, str(tmp_path)) == [0, 0]
    assert jobs.expected(str(tmp_path / "ckpt"), 2, 3, number=2)


def test_groups_of_ranks_save_by_themselves(tmp_path) -> None:
    assert spawn(jobs.in_halves, 4, str(tmp_path)) == [[2, 2, 2]] * 4
    for half in (0, 1):
        ckpt = ucp.open(str(tmp_path / f"{half}-2"))
        assert ckpt.keys() == {"w", f"own{2 * half}", f"own{2 * half + 1}"}
        assert jobs.value(ckpt.url, "w") == {half}


def test_a_large_tensor_that_all_hold_is_cut_among_them(tmp_path) -> None:
    (written, _) = spawn(jobs.balanced, 2, str(tmp_path))
    assert len(written) == 2
    assert max(written) < 0.65 * sum(written)
    assert ucp.open(str(tmp_path / "ckpt"))["large"]["value"][...].sum() == 5 * jobs.SLAB_BYTES // 8


@pytest.mark.parametrize("form", ["native", pytest.param("universal", marks=pytest.mark.slow)])
def test_the_interpreter_waits_for_saves_and_their_threads_before_it_ends(tmp_path, form) -> None:
    program = f"from tests.train.save.jobs import wait_at_exit\nwait_at_exit({str(tmp_path)!r}, {form!r})"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert torch.equal(ucp.open(str(tmp_path / "ckpt"))["w"]["value"][...], torch.arange(5.0))


def test_a_place_that_holds_a_checkpoint_is_refused_and_what_a_dead_save_left_is_removed(tmp_path) -> None:
    left = tmp_path / "shards" / "rank-00007-0-0123abcd.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"half")
    (tmp_path / "shards" / "notes.txt").write_text("mine")
    save({"w": torch.ones(3)}, str(tmp_path), step=1)
    assert not left.exists()
    assert (tmp_path / "shards" / "notes.txt").exists()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConflictError, match="already holds a checkpoint"):
        async_save({"w": torch.zeros(3)}, str(tmp_path)).result()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("on_device", [True, False])
def test_staging_may_go_on_behind_the_caller(tmp_path, monkeypatch, on_device) -> None:
    monkeypatch.setattr(Job, "on_device", on_device)
    tensor = torch.arange(50_000.0)
    for number in range(4):
        handle = async_save({"w": tensor}, str(tmp_path / str(number)), step=number, wait=False)
        handle.staged.result(60)
        tensor += 1
    assert handle.result(60).step == 3
    for number in range(4):
        assert torch.equal(ucp.open(str(tmp_path / str(number)))["w"]["value"][...], torch.arange(50_000.0) + number)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wait", [True, False])
def test_what_a_gpu_computes_after_staging_is_in_no_checkpoint(tmp_path, wait) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensors = {f"w{i}": torch.zeros(1000 * (i + 1), device="cuda") for i in range(20)}
        handles = []
        for number in range(4):
            for tensor in tensors.values():
                tensor.add_(1)
            handles.append(async_save(tensors, str(tmp_path / str(number)), wait=wait))
            handles[-1].staged.result(60)
    for number, handle in enumerate(handles):
        handle.result(60)
        ckpt = ucp.open(str(tmp_path / str(number)))
        assert all(
            torch.equal(ckpt[name]["value"][...], torch.full_like(t, number + 1).cpu()) for name, t in tensors.items()
        )


def test_hyper_parameters_and_state_are_those_of_the_call(tmp_path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    state = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    schedule.step()
    handle = async_save(state, str(tmp_path / "ckpt"), step=1, wait=False)
    handle.staged.result(60)
    optimizer.step()
    schedule.step()
    schedule.base_lrs[0] = 7.0
    assert handle.result(60).step == 1
    ckpt = ucp.open(str(tmp_path / "ckpt"))
    assert ckpt.param_groups[0].options["lr"] == 0.25
    assert ckpt.state["lr_scheduler"]["base_lrs"] == [0.5]
    assert ckpt.state["lr_scheduler"]["last_epoch"] == 1


def test_many_saves_at_once_get_their_memory_in_turn(tmp_path) -> None:
    state = {f"w{number}": torch.full((200, 200), float(number)) for number in range(5)}
    save(state, str(tmp_path / "first"))
    handles = [async_save(state, str(tmp_path / str(number)), wait=False) for number in range(20)]
    assert [handle.result(60).tensors for handle in handles] == [5] * 20


def test_a_save_that_is_interrupted_does_not_end_all_saves(tmp_path, monkeypatch) -> None:
    def interrupted(self: object, task: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(native.NativeForm, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save({"w": torch.ones(3)}, str(tmp_path / "first"))
    save({"w": torch.ones(3)}, str(tmp_path / "second"))
    assert jobs.value(str(tmp_path / "second"), "w") == {1}


@pytest.mark.parametrize("form", ["native", "universal"])
def test_one_element_that_claims_to_lie_apart_is_saved(tmp_path, form) -> None:
    """Slicing with a step leaves strides of what has one element only; it has no gaps all the same."""
    state = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64)[::2], "v": torch.ones(4, 6)[:1, ::6]}
    save(state, str(tmp_path / "now"), form=form)
    async_save(state, str(tmp_path / "later"), form=form).result(60)
    for name in ("now", "later"):
        assert (jobs.value(str(tmp_path / name), "w"), jobs.value(str(tmp_path / name), "v")) == ({3.0}, {1.0})


def test_handles_tell_what_becomes_of_them(tmp_path) -> None:
    handle = async_save({"w": torch.ones(3)}, str(tmp_path / "ckpt"), step=4)
    report = handle.result(60)
    assert handle.done() and handle.staged.done()
    assert not handle.committed.cancel() and not handle.staged.cancel()
    assert repr(handle).endswith("step=4 committed>")
    assert (report.url, report.step, report.form, report.ranks) == (str(tmp_path / "ckpt"), 4, "native", 1)
    assert report.bytes_written == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0 < report.staged_seconds <= report.seconds


def test_options_that_do_not_exist_are_told(tmp_path) -> None:
    with pytest.raises(UsageError, match="'zip' is no form"):
        save({"w": torch.ones(3)}, str(tmp_path), form="zip")
    with pytest.raises(UsageError, match="'ignore'"):
        async_save({"w": torch.ones(3)}, str(tmp_path), on_error="ignore")
    assert not list(tmp_path.iterdir())
