"""Universal copies beside saves: what is taken is what is newest, whatever folders are called and hold."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from torch import nn

import ucp
from ucp.elastic import Run, keep
from ucp.errors import NotFoundError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UCP_NODE", "n")


def put(tmp_path, folder, step, *, form):
    """A real save of `step`, whose weights are all `step`, in the folder of step `folder`, beside what is there."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, float(step))
    made = tmp_path / f"made-{folder}-{step}-{form}"
    ucp.save(model, made, step=step, form=form)
    shutil.copytree(made, tmp_path / "run" / f"step-{folder:08}", dirs_exist_ok=True)


def resumed(tmp_path):
    """The step that a run goes on from, the value of its weights, and the steps that it passed over."""
    model = nn.Linear(3, 2)
    with Run(str(tmp_path / "run"), layouts=keep(), memory=None) as run:
        found = run.resume(model)
        assert run.done == found.step
        (value,) = model.weight.unique().tolist()
        return found.step, value, [version.step for version, _ in found.left]


def test_a_newer_save_is_taken_and_not_an_older_universal_copy(tmp_path):
    put(tmp_path, 100, 100, form="universal")
    put(tmp_path, 200, 200, form="native")
    assert resumed(tmp_path) == (200, 200.0, [])


def test_a_universal_copy_that_is_newer_is_taken(tmp_path):
    put(tmp_path, 100, 100, form="native")
    put(tmp_path, 200, 200, form="universal")
    assert resumed(tmp_path) == (200, 200.0, [])


@pytest.mark.parametrize("form", ["universal", "native"])
def test_an_older_one_in_the_folder_of_a_newer_step_is_passed_over_and_told(tmp_path, caplog, form):
    put(tmp_path, 150, 150, form="native")
    put(tmp_path, 200, 100, form=form)
    with caplog.at_level(logging.WARNING, "ucp"):
        assert resumed(tmp_path) == (150, 150.0, [200])
    assert f"step-00000200: holds a {form} checkpoint of step 100" in caplog.text


def test_where_nothing_else_is_there_the_remedy_is_told(tmp_path):
    put(tmp_path, 200, 100, form="universal")
    told = r"step 200 in storage: .*step-00000200: holds a universal checkpoint of step 100"
    with pytest.raises(NotFoundError, match=told):
        resumed(tmp_path)
    (tmp_path / "run" / "step-00000200").rename(tmp_path / "run" / "step-00000100")
    assert resumed(tmp_path) == (100, 100.0, [])


@pytest.mark.parametrize(
    ("native", "universal", "taken"),
    [(200, 100, "native"), (200, 200, "native"), (100, 200, "universal")],
    ids=["stale universal copy", "universal copy", "stale native save"],
)
def test_of_two_in_one_folder_the_one_of_its_step_is_taken(tmp_path, caplog, native, universal, taken):
    put(tmp_path, 50, 50, form="native")
    put(tmp_path, 200, universal, form="universal")
    put(tmp_path, 200, native, form="native")
    model = nn.Linear(3, 2)
    with caplog.at_level(logging.WARNING, "ucp"), Run(str(tmp_path / "run"), layouts=keep(), memory=None) as run:
        found = run.resume(model)
        assert (found.step, found.left, model.weight.unique().tolist()) == (200, (), [200.0])
    left, of = ("universal", universal) if taken == "native" else ("native", native)
    assert f"takes the {taken} checkpoint of step 200, and leaves a {left} one of step {of}" in caplog.text


def test_of_two_in_one_folder_both_of_another_step_neither_is_taken(tmp_path):
    put(tmp_path, 50, 50, form="native")
    put(tmp_path, 200, 100, form="universal")
    put(tmp_path, 200, 120, form="native")
    assert resumed(tmp_path) == (50, 50.0, [200])


def test_a_damaged_one_of_two_leaves_the_other(tmp_path):
    put(tmp_path, 200, 200, form="universal")
    put(tmp_path, 200, 200, form="native")
    (tmp_path / "run" / "step-00000200" / "ucp.json").write_text("{}")
    assert resumed(tmp_path) == (200, 200.0, [])


def test_a_checkpoint_that_knows_no_step_has_that_of_its_folder(tmp_path):
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    ucp.save(model, tmp_path / "run" / "step-00000007")
    assert ucp.open(tmp_path / "run" / "step-00000007").step is None
    assert resumed(tmp_path) == (7, 1.0, [])


def test_the_layout_is_chosen_by_the_one_that_is_taken(tmp_path, monkeypatch):
    """What it takes in memory is not told by another one in its folder."""
    from ucp.elastic import run as module

    asked = []
    real = module.choose
    monkeypatch.setattr(module, "choose", lambda *args, **options: asked.append(options) or real(*args, **options))
    put(tmp_path, 200, 100, form="universal")
    put(tmp_path, 200, 200, form="native")
    assert resumed(tmp_path)[0] == 200
    assert [(one["catalog"].step, one["catalog"].source.family) for one in asked] == [(200, "native")]


def test_what_was_passed_over_is_recorded(tmp_path):
    put(tmp_path, 150, 150, form="native")
    put(tmp_path, 200, 100, form="universal")
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Run(str(tmp_path / "run"), layouts=keep(), memory=None) as run:
        run.resume(model)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        run.step(151, model)
    record = json.loads((tmp_path / "run" / "elastic" / "timeline-00001.json").read_text())
    assert (record["step"], record["tier"]) == (150, "storage")
