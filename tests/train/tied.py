"""A small model with tied weights and buffers, trained a little, and a checkpoint of it made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.handmade import flat, make
from ucp.checkpoint import Checkpoint


class Net(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens)))


def trained(**options: Any) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = adamw(model, **options)
    for _ in range(3):
        train_step(model, optimizer)
    model.calls.fill_(17)
    return model, optimizer


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "lr": 0.02, "weight_decay": 0.1}, {"params": others, "lr": 0.01, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.8, 0.9), **options)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    tokens = torch.arange(22).reshape(2, 11) % 11
    logits = model(tokens).float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), (tokens * 3 % 11).flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def checkpoint(path: Path | str, model: Net, optimizer: torch.optim.Optimizer, **options: Any) -> Checkpoint:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, dict[str, torch.Tensor]] = {name: {"value": p.detach()} for name, p in model.named_parameters()}
    steps: dict[str, float] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if key == "step":
                steps[names[id(parameter)]] = float(value)
            else:
                tensors[names[id(parameter)]][key] = value
    tensors["calls"] = {"value": model.calls}
    groups = [
        ([names[id(p)] for p in group["params"]], {k: v for k, v in group.items() if k != "params"})
        for group in optimizer.param_groups
    ]
    options = {"kinds": {"calls": "buffer"}, "steps": steps, "groups": groups, **options}
    ties = {"head.weight": "embed.weight"} if model.head.weight is model.embed.weight else {}
    return Checkpoint(*make(str(path), tensors, **{"ties": ties, **options}))


@pytest.fixture
def source(tmp_path: Path) -> tuple[Net, torch.optim.Optimizer, Checkpoint]:
    model, optimizer = trained()
    return model, optimizer, checkpoint(tmp_path, model, optimizer, cut=flat(3))


def assert_same_state(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype
            assert torch.equal(value, right[key]), key
        else:
            assert value == right[key], key
