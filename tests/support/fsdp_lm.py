"""An FSDP2 job of the tiny language model that saves with torch's distributed checkpoint and trains on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.model import build_model, local_batch, param_groups
from tests.support.optimizers import build_optimizer

Numbers = dict[str, Any]


def train_and_save(rank: int, world: int, folder: str, steps: int, more_steps: int) -> Numbers:
    """Train as the DeepSpeed jobs do, save into `folder`: the truth by ``kind/name`` and the losses after the save."""
    model = build_model(seed=7)
    fully_shard(model)
    optimizer = build_optimizer("adamw", param_groups(model))
    for step in range(steps):
        _step(model, optimizer, step, rank, world)
    states, optim = get_state_dict(model, optimizer)
    save({"model": states, "optim": optim}, checkpoint_id=folder)
    truth = _truth(model, optimizer)
    losses = [_step(model, optimizer, step, rank, world) for step in range(steps, steps + more_steps)]
    return {"truth": truth, "losses": losses}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int, world: int) -> float:
    inputs, labels = local_batch(step, rank=rank, world=world)
    loss: Tensor = model(inputs, labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().double().clone()
    distributed.all_reduce(mean)
    return mean.item() / world


def _truth(model: nn.Module, optimizer: torch.optim.Optimizer) -> Numbers:
    found: Numbers = {}
    for name, parameter in model.named_parameters():
        found[f"{'param' if parameter.requires_grad else 'frozen'}/{name}"] = _whole(parameter)
        for state, value in optimizer.state.get(parameter, {}).items():
            if state != "step":
                found[f"{state}/{name}"] = _whole(value)
    kept = model.state_dict()
    found.update({f"buffer/{name}": _whole(buffer) for name, buffer in model.named_buffers() if name in kept})
    return {name: value.numpy() for name, value in found.items()}


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
