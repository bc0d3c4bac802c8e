"""`ucp.load` into optimizers and schedulers: they go on as if never stopped, or are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ucp
from tests.train.handmade import columns, flat, make, whole
from tests.train.tied import Net, adamw, assert_same_state, checkpoint, train_step, trained
from ucp.checkpoint import Checkpoint


@pytest.mark.parametrize("cut", [whole, flat(1), flat(3), flat(5), columns(2)])
def test_a_model_and_its_optimizer_go_on_as_if_never_stopped(tmp_path: Path, cut: Any) -> None:
    model, optimizer = trained()
    ckpt = checkpoint(tmp_path, model, optimizer, cut=cut)
    torch.manual_seed(1)
    other = Net()
    resumed = torch.optim.AdamW(
        [{"params": [p for p in other.parameters() if p.ndim > 1]}, {"params": list(other.norm.parameters())}], lr=1.0
    )
    report = ucp.load((other, resumed), ckpt)
    assert_same_state(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embed.weight
    for group, wanted in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in wanted.items() if k != "params"}
        for mine, theirs in zip(group["params"], wanted["params"], strict=True):
            assert_same_state(resumed.state[mine], optimizer.state[theirs])
    losses = [(train_step(model, optimizer), train_step(other, resumed)) for _ in range(3)]
    assert all(a == b for a, b in losses)
    assert (report.tensors, report.missing, report.unexpected, report.casts) == (4, (), (), ())
    assert "loaded step 7" in str(report)


class Vectors(nn.Module):
    """Parameters as small as what the optimizer is tried on to learn which states it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))
        self.third, self.fourth = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(()))


def test_equal_and_tiny_parameters_have_states_of_their_own(tmp_path: Path) -> None:
    model = Vectors()
    optimizer = torch.optim.AdamW(model.parameters())
    sum((p * p * (i + 1)).sum() for i, p in enumerate(model.parameters())).backward()
    optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    tensors = {name: {"value": p.detach(), **optimizer.state[p]} for name, p in model.named_parameters()}
    steps = {name: float(states.pop("step")) for name, states in tensors.items()}
    hyper = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    ckpt = Checkpoint(*make(str(tmp_path), tensors, steps=steps, groups=[(names, hyper)]))
    other = Vectors()
    resumed = torch.optim.AdamW(other.parameters())
    ucp.load((other, resumed), ckpt)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_state(resumed.state[mine], optimizer.state[theirs])
    held = [value.data_ptr() for state in resumed.state.values() for value in state.values()]
    assert len(set(held)) == len(held)


def test_an_optimizer_that_has_state_is_filled_in_place(source: Any) -> None:
    model, optimizer, ckpt = source
    other, resumed = trained()
    train_step(other, resumed)
    before = {id(v) for state in resumed.state.values() for k, v in state.items() if k != "step"}
    ucp.load({"model": other, "optimizer": resumed}, ckpt)
    after = {id(v) for state in resumed.state.values() for k, v in state.items() if k != "step"}
    assert before == after
    assert train_step(model, optimizer) == train_step(other, resumed)


def test_groups_are_matched_by_name_and_not_by_position(source: Any) -> None:
    model, optimizer, ckpt = source
    other = Net()
    norm, embed = list(other.norm.parameters()), [other.embed.weight]
    resumed = torch.optim.AdamW([{"params": [norm[1]]}, {"params": embed}, {"params": [norm[0]]}])
    ucp.load((other, resumed), ckpt)
    assert [group["lr"] for group in resumed.param_groups] == [0.01, 0.02, 0.01]
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.0, 0.1, 0.0]
    assert resumed.param_groups[0]["betas"] == (0.8, 0.9)
    for _ in range(2):
        assert train_step(model, optimizer) == train_step(other, resumed)


def test_one_group_cannot_hold_two_learning_rates(source: Any) -> None:
    _, _, ckpt = source
    other = Net()
    resumed = torch.optim.AdamW(other.parameters(), lr=0.5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ucp.FitError, match=r"group 0 lr \(0.02 for embed.weight; 0.01 for norm.weight, norm.bias\)"
    ) as no:
        ucp.load((other, resumed), ckpt)
    assert "hyper_parameters=False" in str(no.value.hint)
    assert_same_state(other.state_dict(), before)
    assert not resumed.state
    ucp.load((other, resumed), ckpt, hyper_parameters=False)
    assert resumed.param_groups[0]["lr"] == 0.5
    assert len(resumed.state) == 3


def test_another_optimizer_is_refused(source: Any) -> None:
    _, _, ckpt = source
    other = Net()
    with pytest.raises(ucp.FitError) as no:
        ucp.load((other, torch.optim.SGD(other.parameters(), momentum=0.9)), ckpt, hyper_parameters=False)
    assert "missing: norm.bias[momentum_buffer]" in str(no.value)
    assert "unexpected: norm.bias[exp_avg]" in str(no.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.01}),
        (torch.optim.NAdam, {"lr": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.01}),
        (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
        (torch.optim.Adafactor, {"lr": 0.01}),
    ],
)
def test_optimizers_of_torch(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = kind(model.parameters(), **options)
    for _ in range(3):
        train_step(model, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {name: {"value": p.detach()} for name, p in model.named_parameters()}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            small = not torch.is_tensor(value) or value.ndim == 0
            (scalars if small else tensors).setdefault(names[id(parameter)], {})[key] = value
    tensors["calls"] = {"value": model.calls}
    catalog, store = make(str(tmp_path), tensors, ties={"head.weight": "embed.weight"}, cut=flat(2))
    for name, found in scalars.items():
        held: Any = catalog.tensors[name].scalars
        held.update({key: ucp.Scalar(float(value), "float32") for key, value in found.items()})
    other = Net()
    resumed = kind(other.parameters(), **options)
    ucp.load((other, resumed), Checkpoint(catalog, store), hyper_parameters=False)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_state(
            resumed.state.get(mine, {}), {k: v for k, v in optimizer.state[theirs].items() if v is not None}
        )
    assert [train_step(model, optimizer) for _ in range(2)] == [train_step(other, resumed) for _ in range(2)]


def test_a_parameter_that_never_had_a_gradient_starts_without_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    model.norm.bias.requires_grad_(False)
    optimizer = adamw(model)
    train_step(model, optimizer)
    ckpt = checkpoint(tmp_path, model, optimizer)
    other, resumed = trained()
    report = ucp.load((other, resumed), ckpt)
    assert report.without_state == ("norm.bias",)
    assert other.norm.bias not in resumed.state


def test_a_source_without_optimizer_state(tmp_path: Path) -> None:
    model, optimizer = trained()
    tensors = {name: {"value": p.detach()} for name, p in model.state_dict().items() if name != "head.weight"}
    ckpt = Checkpoint(*make(str(tmp_path), tensors, ties={"head.weight": "embed.weight"}))
    with pytest.raises(ucp.FitError, match="missing: optimizer state"):
        ucp.load((model, optimizer), ckpt)
    ucp.load(model, ckpt)


def test_schedulers_follow_the_groups(tmp_path: Path) -> None:
    model, optimizer = trained()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for _ in range(3):
        train_step(model, optimizer)
        schedule.step()
    ckpt = checkpoint(tmp_path, model, optimizer, state={"lr_scheduler": schedule.state_dict(), "rng": 1})
    other = Net()
    resumed = torch.optim.AdamW([{"params": list(other.norm.parameters())}, {"params": [other.embed.weight]}])
    again = torch.optim.lr_scheduler.StepLR(resumed, 2, gamma=0.5)
    report = ucp.load({"model": other, "optimizer": resumed, "lr_scheduler": again}, ckpt)
    assert again.base_lrs == [0.01, 0.02]
    assert report.not_loaded == ("rng",)
    for _ in range(3):
        assert train_step(model, optimizer) == train_step(other, resumed)
        schedule.step()
        again.step()
        assert again.get_last_lr() == schedule.get_last_lr()[::-1]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 5)
    with pytest.raises(ucp.FitError, match=r"missing: lr_scheduler.T_max"):
        ucp.load({"model": other, "optimizer": resumed, "lr_scheduler": cosine}, ckpt)
