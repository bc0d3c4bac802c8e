"""The demo's FSDP2 jobs: resume from any readable checkpoint. Runs inside ranks only."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ucp
from ucp.demo.model import build_model, local_batch, param_groups


def resume(rank: int, world: int, url: str, first: int, steps: int) -> list[float]:
    """Load `url` into an FSDP2 model and its optimizer, and train from step `first`; the losses."""
    model, optimizer = _sharded(world)
    ucp.load((model, optimizer), url)
    return _train(model, optimizer, rank, world, first, steps)


def _sharded(world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    model = build_model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(param_groups(model))


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, first: int, steps: int
) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss: Tensor = model(*local_batch(step, rank=rank, world=world))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().double()
        distributed.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses
