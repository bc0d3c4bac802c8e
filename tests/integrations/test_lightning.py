from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.integrations.lightning_jobs import fit, fit_with_files
from tests.support.gloo import spawn


def check_equal(one: dict[str, Any], other: dict[str, Any], *, exactly: bool) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        tolerance = {} if exactly else {"rtol": 1e-5, "atol": 1e-6}
        close = torch.equal(value, other[name]) if exactly else torch.allclose(value, other[name], **tolerance)
        assert close, name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp2", 2), ("single", 1)),
        pytest.param(("single", 1), ("ddp", 2), marks=pytest.mark.slow),
        pytest.param(("ddp", 2), ("fsdp2", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp2", 2), ("fsdp2", 3), marks=pytest.mark.slow),
    ],
    ids=lambda layout: "x".join(map(str, layout)),
)
def test_a_run_goes_on_under_another_strategy(tmp_path: Path, before: Any, after: Any) -> None:
    url = str(tmp_path / "run")
    (strategy, world), (other, others) = before, after
    first = spawn(fit, world, url, strategy, 6)[0]
    assert (first["resumed"], first["step"], first["saved"][-2:]) == (None, 6, [4, 6])
    second = spawn(fit, others, url, other, 12)
    truth = spawn(fit, 1, str(tmp_path / "truth"), "single", 12)[0]
    for result in second:
        assert (result["resumed"], result["step"], result["epoch"]) == (6, 12, truth["epoch"])
        assert result["seen"] == list(range(6, 12))
        assert (result["batches"], result["lr"]) == (12, truth["lr"])
        check_equal(result["state"], truth["state"], exactly=before[0] == after[0] == "single")


@pytest.mark.slow
def test_a_signal_saves_and_stops_all_ranks(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    results = spawn(fit, 2, url, "ddp", 50, 1)
    (step,) = {result["step"] for result in results}
    assert 5 <= step <= 7
    assert all(result["restored"] and result["preempted"] and result["saved"][-1] == step for result in results)
    assert spawn(fit, 1, url, "single", step + 1)[0]["seen"] == [step]


@pytest.mark.slow
def test_the_best_by_what_was_logged(tmp_path: Path) -> None:
    result = spawn(fit, 1, str(tmp_path / "run"), "single", 8)[0]
    assert result["best"].metrics["loss"] > 0
    assert result["best"].step in result["saved"]


@pytest.mark.slow
def test_lightnings_own_checkpoints_are_ours(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (_, _, same), _ = spawn(fit_with_files, 2, str(folder), "ddp", 4, None)
    assert same
    newest = folder / "at-step=4.ckpt"
    assert sorted(path.name for path in folder.iterdir()) == ["at-step=2.ckpt", "at-step=4.ckpt"]
    seen, state, same = spawn(fit_with_files, 1, str(folder), "single", 6, str(newest))[0]
    assert seen == [4, 5]
    assert same
    truth = spawn(fit_with_files, 1, str(tmp_path / "truth"), "single", 6, None)[0]
    check_equal(state, truth[1], exactly=False)


def test_a_failed_save_leaves_the_file_before_and_files_of_lightnings_own_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ucp.integrations.lightning import UcpCheckpointIO

    files, here = UcpCheckpointIO(), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    torch.save({"state_dict": {}}, "last.ckpt")
    for step in (1, 2):
        files.save_checkpoint({"state_dict": {"w": torch.full((2,), step)}, "global_step": step}, "last.ckpt")
    with pytest.raises(ucp.FitError, match="a object cannot be saved"):
        files.save_checkpoint({"state_dict": {"w": torch.ones(2)}, "bad": object()}, "last.ckpt")
    kept = files.load_checkpoint("last.ckpt")
    assert (kept["global_step"], kept["state_dict"]["w"].tolist()) == (2, [2, 2])
    torch.save({}, "old.ckpt")
    for name in ("old.ckpt", "last.ckpt"):
        files.remove_checkpoint(name)
    assert not list(here.iterdir())
