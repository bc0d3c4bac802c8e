"""The demo's jobs with torch alone: FSDP2, FSDP2 with tensor parallelism, DDP. Runs inside ranks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ucp
from ucp.demo.model import Transformer, build_model, local_batch, param_groups
from ucp.train.save import save

Layout = Literal["fsdp2", "fsdp2+tp2", "ddp"]
OTHER_SEED = 4242
"""Models that resume start from other weights, so whatever was not loaded shows."""


@dataclass(frozen=True, slots=True)
class Job:
    """A wrapped model and its optimizer; this rank trains on part `part` of `parts` of every batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    part: int
    parts: int


def train_and_save(rank: int, world: int, url: str, before: int, after: int) -> list[float]:
    """Train `before` steps with FSDP2, save, train `after` more; all losses."""
    job = _job("fsdp2", rank, world, seed=1)
    losses = _train(job, 0, before)
    save((job.model, job.optimizer), url, step=before)
    return losses + _train(job, before, after)


def resume(rank: int, world: int, url: str, layout: Layout, first: int, steps: int) -> list[float]:
    """Load `url` into a model of `layout` and its optimizer, and train from step `first`; the losses."""
    job = _job(layout, rank, world, seed=OTHER_SEED)
    ucp.load((job.model, job.optimizer), url)
    return _train(job, first, steps)


def _job(layout: Layout, rank: int, world: int, *, seed: int) -> Job:
    model = build_model(seed)
    if layout == "ddp":
        wrapped = DistributedDataParallel(model)
        return Job(wrapped, torch.optim.AdamW(param_groups(wrapped)), rank, world)
    if layout == "fsdp2":
        dp = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    else:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        _split_layers(model, mesh["tp"])
        dp = mesh["dp"]
    for block in model.blocks:
        fully_shard(block, mesh=dp)
    fully_shard(model, mesh=dp)
    return Job(model, torch.optim.AdamW(param_groups(model)), dp.get_local_rank(), dp.size())


def _split_layers(model: Transformer, tp: DeviceMesh) -> None:
    """Tensor parallelism over the MLPs; their inner size is odd, so that the ranks' parts differ."""
    for block in model.blocks:
        parallelize_module(block, tp, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()})


def _train(job: Job, first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss: Tensor = job.model(*local_batch(step, rank=job.part, world=job.parts))
        loss.backward()  # type: ignore[no-untyped-call]
        job.optimizer.step()
        job.optimizer.zero_grad()
        mean = loss.detach().double()
        distributed.all_reduce(mean)
        losses.append(mean.item() / distributed.get_world_size())
    return losses
