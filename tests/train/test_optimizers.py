"""What optimizers and schedulers keep: learned without touching them, refused where it would only be guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import ucp
from tests.train.tied import Net, adamw, assert_same_state, checkpoint, train_step, trained
from ucp.train.save import save

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Counted(torch.optim.Optimizer):
    """Lion, with plain numbers in its state and a list of its own."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})
        self.calls: list[int] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls.append(len(self.calls))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(exp_avg=torch.zeros_like(parameter), count=0, odd=False)
                update = state["exp_avg"].lerp(parameter.grad, 1 - group["betas"][0])
                parameter.sub_(update.sign_(), alpha=group["lr"])
                state["exp_avg"].lerp_(parameter.grad, 1 - group["betas"][1])
                state["count"] += 1
                state["odd"] = not state["odd"]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "lr": 0.02}, {"params": others, "lr": 0.01}]


MAKERS: dict[str, Make] = {
    "nesterov": lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.9, nesterov=True),
    "amsgrad": lambda g: torch.optim.AdamW(g, amsgrad=True),
    "fused": lambda g: torch.optim.AdamW(g, fused=True),
    "foreach": lambda g: torch.optim.AdamW(g, foreach=True),
    "tensor-lr": lambda g: torch.optim.Adam([{**group, "lr": torch.tensor(group["lr"])} for group in g]),
    "radam": torch.optim.RAdam,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "adamax": torch.optim.Adamax,
    "adadelta": torch.optim.Adadelta,
    "muon": lambda g: torch.optim.Muon(g[:1]),
    "counted": Counted,
}


@pytest.mark.parametrize("warm", [False, True], ids=["new", "warm"])
@pytest.mark.parametrize("name", MAKERS)
def test_what_was_saved_goes_on(tmp_path: Path, name: str, warm: bool) -> None:
    torch.manual_seed(0)
    model, other = Net(), Net()
    optimizer, resumed = MAKERS[name](groups(model)), MAKERS[name](groups(other))
    for _ in range(3):
        train_step(model, optimizer)
    if warm:
        train_step(other, resumed)
    save((model, optimizer), str(tmp_path / "saved"))
    ucp.load((other, resumed), tmp_path / "saved")
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_state(resumed.state.get(mine, {}), optimizer.state.get(theirs, {}))
    assert [train_step(other, resumed) for _ in range(2)] == [train_step(model, optimizer) for _ in range(2)]


def test_an_optimizer_is_not_touched_by_being_tried(tmp_path: Path) -> None:
    model = Net()
    optimizer = Counted(model.parameters())
    train_step(model, optimizer)
    save((model, optimizer), str(tmp_path / "saved"))
    other = Net()
    resumed = Counted(other.parameters())
    ucp.load((other, resumed), tmp_path / "saved")
    assert resumed.calls == []


@pytest.mark.parametrize("options", [{"differentiable": True}, {"capturable": True}])
def test_ways_to_compute_do_not_change_what_is_kept(tmp_path: Path, options: dict[str, Any]) -> None:
    model, optimizer = trained()
    other = Net()
    resumed = adamw(other, **options)
    ucp.load((other, resumed), checkpoint(tmp_path, model, optimizer))
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_state(resumed.state[mine], optimizer.state[theirs])


def test_sparse_gradients(tmp_path: Path) -> None:
    def step(model: nn.Embedding, optimizer: torch.optim.Optimizer) -> None:
        model(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, other = (nn.Embedding(5, 3, sparse=True) for _ in range(2))
    optimizer, resumed = (torch.optim.SparseAdam(m.parameters()) for m in (model, other))
    step(model, optimizer)
    save((model, optimizer), str(tmp_path / "saved"))
    ucp.load((other, resumed), tmp_path / "saved")
    assert_same_state(resumed.state[other.weight], optimizer.state[model.weight])
    step(model, optimizer)
    step(other, resumed)
    assert torch.equal(model.weight, other.weight)


def test_states_are_not_guessed(tmp_path: Path) -> None:
    ckpt = checkpoint(tmp_path, *trained())
    other = Net()
    resumed = torch.optim.LBFGS(other.parameters())
    with pytest.raises(ucp.FitError, match=r"optimizer: group 0 .LBFGS makes no state") as no:
        ucp.load((other, resumed), ckpt, hyper_parameters=False, strict=False)
    assert "take a step" in str(no.value.hint)
    assert not resumed.state


def test_one_algorithm_does_not_become_another(tmp_path: Path) -> None:
    model = Net()
    for decay in (0.1, 0.0):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=decay)
        train_step(model, optimizer)
        save((model, optimizer), str(tmp_path / f"{decay}"))
    other = Net()
    resumed = torch.optim.AdamW(other.parameters())
    with pytest.raises(ucp.FitError, match=r"decoupled_weight_decay \(False in the source, True in the target"):
        ucp.load((other, resumed), tmp_path / "0.1")
    ucp.load((other, resumed), tmp_path / "0.0")
    assert resumed.param_groups[0]["decoupled_weight_decay"]
    assert train_step(other, resumed) == train_step(model, optimizer)


def test_options_without_a_place_are_noted(tmp_path: Path) -> None:
    model, optimizer = trained()
    optimizer.param_groups[0]["bias_correction"] = False
    other = Net()
    report = ucp.load((other, adamw(other)), checkpoint(tmp_path, model, optimizer))
    assert "group 0 has no bias_correction, which the source has" in report.notes


def test_schedulers_inside_schedulers_follow_the_groups(tmp_path: Path) -> None:
    def build(model: Net, order: int) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(groups(model)[::order])
        parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.StepLR(optimizer, 2, 0.5)]
        parts.append(lr_scheduler.StepLR(optimizer, 2, 0.1))
        return optimizer, lr_scheduler.SequentialLR(optimizer, parts, milestones=[3, 6])

    model, other = Net(), Net()
    optimizer, schedule = build(model, 1)
    resumed, again = build(other, -1)
    for _ in range(2):
        train_step(model, optimizer)
        schedule.step()
    save({"model": model, "optimizer": optimizer, "lr_scheduler": schedule}, str(tmp_path / "saved"))
    ucp.load({"model": other, "optimizer": resumed, "lr_scheduler": again}, tmp_path / "saved")
    assert again._milestones == [3, 6]
    assert [part.base_lrs for part in again._schedulers] == [[0.01, 0.02]] * 3
    for _ in range(6):
        assert train_step(model, optimizer) == train_step(other, resumed)
        schedule.step()
        again.step()
        assert again.get_last_lr() == schedule.get_last_lr()[::-1]


def test_lists_that_may_be_by_group_are_not_guessed(tmp_path: Path) -> None:
    class Own(lr_scheduler.LambdaLR):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            super().__init__(optimizer, lambda step: 1.0)
            self.floors = [0.5, 0.25]

    model, other = Net(), Net()
    optimizer, same, turned = (torch.optim.AdamW(g) for g in (groups(model), groups(other), groups(other)[::-1]))
    train_step(model, optimizer)
    save({"model": model, "optimizer": optimizer, "lr_scheduler": Own(optimizer)}, str(tmp_path / "saved"))
    again = Own(same)
    again.floors = []
    ucp.load({"model": other, "optimizer": same, "lr_scheduler": again}, tmp_path / "saved")
    assert again.floors == [0.5, 0.25]
    with pytest.raises(ucp.FitError, match=r"lr_scheduler\.floors \(may be by group"):
        ucp.load({"model": other, "optimizer": turned, "lr_scheduler": Own(turned)}, tmp_path / "saved")


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.MultiStepLR(o, [3, 5]),
        lr_scheduler.ReduceLROnPlateau,
        lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=20),
        lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, cycle_momentum=False),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    ],
)
def test_schedulers_of_torch(tmp_path: Path, make: Any) -> None:
    model, other = Net(), Net()
    optimizer, resumed = adamw(model), adamw(other)
    schedule, again = make(optimizer), make(resumed)
    metric = [1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []
    for _ in range(3):
        train_step(model, optimizer)
        schedule.step(*metric)
    save({"model": model, "optimizer": optimizer, "lr_scheduler": schedule}, str(tmp_path / "saved"))
    ucp.load({"model": other, "optimizer": resumed, "lr_scheduler": again}, tmp_path / "saved")
    assert again.state_dict() == schedule.state_dict()
    for _ in range(3):
        assert train_step(model, optimizer) == train_step(other, resumed)
        schedule.step(*metric)
        again.step(*metric)
        assert again.get_last_lr() == schedule.get_last_lr()
