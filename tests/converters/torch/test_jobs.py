"""What Lightning, Accelerate and Trainer saved, read back bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.converters.torch.against import check_truth, same
from tests.support.torch_jobs import STEPS, Net
from ucp.errors import FitError

Job = tuple[Path, dict[str, Any]]
Jobs = Callable[[str], Job]


@pytest.mark.slow
def test_lightning(job: Jobs) -> None:
    path, truth = job("lightning")
    ckpt = check_truth(path, truth)
    saved = torch.load(path, weights_only=False)
    assert (ckpt.family, ckpt.catalog.source.detail["layout"], ckpt.url) == ("torch", "lightning", str(path))
    assert ckpt.catalog.source.version == saved["pytorch-lightning_version"]
    assert ckpt.read_state("lr_scheduler") == saved["lr_schedulers"][0]
    assert ckpt.state["hyper_parameters"] == {"width": 4}
    assert ckpt.state["loops"]["fit_loop"]["epoch_progress"] == saved["loops"]["fit_loop"]["epoch_progress"]
    assert set(saved) - set(ckpt.state) == {"state_dict", "optimizer_states", "lr_schedulers", "global_step"}
    assert ckpt.ties == {"net.tied.weight": "net.first.weight"}
    assert any("inferred" in note for note in ckpt.notes)


def test_lightning_loads_into_a_plain_job(job: Jobs) -> None:
    path, truth = job("lightning")
    net = Net()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=9.0)
    holder = torch.nn.Module()
    holder.net = net
    ucp.load((holder, optimizer), str(path))
    for name, parameter in holder.named_parameters():
        assert same(parameter.detach(), truth["values"][name]), name
        for state, value in truth["states"].get(name, {}).items():
            assert same(optimizer.state[parameter][state], value), (name, state)
    assert optimizer.param_groups[0]["lr"] == truth["groups"][0][1]["lr"]


@pytest.mark.parametrize("kind", ["accelerate", pytest.param("accelerate-bin", marks=pytest.mark.slow)])
def test_accelerate(job: Jobs, kind: str) -> None:
    path, truth = job(kind)
    if kind == "accelerate":  # safetensors keeps one name of two
        truth = {**truth, "values": {n: v for n, v in truth["values"].items() if n != "tied.weight"}}
    ckpt = check_truth(path, truth)
    saved = torch.load(path / "scheduler.bin", weights_only=False)
    random = torch.load(path / "random_states_0.pkl", weights_only=False)
    assert (ckpt.family, ckpt.catalog.source.detail["layout"]) == ("torch", "accelerate")
    assert ckpt.read_state("lr_scheduler") == saved
    assert same(ckpt.read_state("rng")["torch_manual_seed"], random["torch_manual_seed"])
    assert ckpt.read_state("rng")["random_state"] == random["random_state"]


def test_names_that_safetensors_and_numbers_leave_open(job: Jobs) -> None:
    """The optimizer numbers, the weights are sorted by name: only what has a shape of its own is certain."""
    path, truth = job("accelerate-unnamed")
    ckpt = ucp.open(str(path))
    states = {name: set(ckpt[name]) - {"value"} for name in ckpt}
    assert {name for name, held in states.items() if held} == {"first.weight", "second.weight"}
    for name in ("first.weight", "second.weight"):
        assert same(ckpt[name]["exp_avg"][...], truth["states"][name]["exp_avg"])
    with pytest.raises(FitError, match="cannot be told"):
        ckpt["norm.bias"]["exp_avg"]
    assert len(ckpt.state["optimizer"]["unnamed"]) == 4
    assert any("order=" in note for note in ckpt.notes)


@pytest.mark.parametrize("form", ["list", "text", "patterns", "file"])
def test_names_that_are_told(job: Jobs, form: str, tmp_path: Path) -> None:
    path, truth = job("accelerate-unnamed")
    truth = {**truth, "values": {n: v for n, v in truth["values"].items() if n != "tied.weight"}}
    names = [name for name, parameter in Net().named_parameters() if parameter.requires_grad]
    (tmp_path / "names.txt").write_text("\n".join(names))
    order: Any = {
        "list": names,
        "text": " ".join(names),
        "patterns": "first.weight first.bias norm.weight norm.bias second.weight second.bias",
        "file": str(tmp_path / "names.txt"),
    }[form]
    check_truth(path, truth, order=order)


@pytest.mark.slow
def test_trainer(job: Jobs) -> None:
    path, truth = job("trainer")
    ckpt = check_truth(path, truth, family="torch")
    random = torch.load(path / "rng_state.pth", weights_only=False)
    assert ckpt.catalog.source.detail["layout"] == "trainer"
    assert ckpt.step == STEPS
    assert ckpt.read_state("lr_scheduler") == torch.load(path / "scheduler.pt", weights_only=False)
    assert same(ckpt.read_state("rng")["cpu"], random["cpu"])
    assert ckpt.state["trainer_state.json"] == (path / "trainer_state.json").read_bytes()
    assert [len(group.params) for group in ckpt.param_groups] == [16, 5]


@pytest.mark.parametrize("kind", ["lightning", "accelerate", "accelerate-unnamed", "trainer"])
def test_into_the_universal_form_and_back_out(job: Jobs, kind: str, tmp_path: Path) -> None:
    path, _ = job(kind)
    source = ucp.open(str(path), family="torch")
    ucp.convert(str(path), str(tmp_path / "universal"), family="torch")
    result = ucp.open(str(tmp_path / "universal"))
    for name in source:
        for state in source[name]:
            assert same(source[name][state][...], result[name][state][...])
    assert result.param_groups == source.param_groups
    assert list(result.state) == list(source.state)


def test_an_optimizer_that_was_not_copied(job: Jobs, tmp_path: Path) -> None:
    path, _ = job("trainer")
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    assert not any("no optimizer" in note for note in ucp.open(str(copy)).notes)
    (copy / "optimizer.pt").unlink()
    assert any("a scheduler lies here and no optimizer" in note for note in ucp.open(str(copy)).notes)
