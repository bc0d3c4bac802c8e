"""The model of `tests.support.model` under FSDP2, trained by the rules of the DeepSpeed jobs: losses are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.case import Case
from tests.support.model import build_model, local_batch, param_groups
from tests.support.optimizers import build_optimizer

Truth = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Fsdp2:
    """A job in fp32; `state` is what ``ucp.save`` and ``ucp.load`` take."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    rank: int
    world: int

    @property
    def state(self) -> dict[str, Any]:
        """Module, optimizer and scheduler."""
        return {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}


def build(case: Case, rank: int, world: int) -> Fsdp2:
    """The case's model, every block and the whole sharded over all ranks."""
    model = build_model(seed=case.seed, tied=case.tied, frozen=case.frozen, unused=case.unused)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = build_optimizer(case.optimizer, param_groups(model, groups=case.groups))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))
    return Fsdp2(model, optimizer, scheduler, rank, world)


def train(job: Fsdp2, first: int, count: int) -> list[float]:
    """Losses averaged over ranks; gradients are clipped as DeepSpeed clips them."""
    losses = []
    for step in range(first, first + count):
        loss = job.model(*local_batch(step, rank=job.rank, world=job.world))
        loss.backward()
        nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
        job.optimizer.step()
        job.optimizer.zero_grad()
        job.scheduler.step()
        mean = loss.detach().double().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / job.world)
    return losses


def gather(job: Fsdp2) -> Truth:
    """Every tensor, whole, under the keys of `tests.support.truth` (collective)."""
    truth: Truth = {}
    for name, parameter in job.model.named_parameters():
        truth[f"{'param' if parameter.requires_grad else 'frozen'}/{name}"] = _whole(parameter)
        for kind, value in job.optimizer.state.get(parameter, {}).items():
            if value.ndim:
                truth[f"{kind}/{name}"] = _whole(value)
    truth.update({f"buffer/{name}": value for name, value in job.model.named_buffers() if name != "scratch"})
    return {key: value.detach().contiguous().clone() for key, value in truth.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
