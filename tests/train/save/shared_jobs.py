"""A model with a frozen base and a small trained adapter, and ranks that save it."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ucp

WIDTH, RANK = 768, 4


class Adapted(nn.Module):
    """Two frozen layers, the second with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
        self.lora = nn.Sequential(nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora(x)


def adapted() -> tuple[Adapted, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Adapted()
    return model, torch.optim.AdamW(model.lora.parameters(), foreach=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.manual_seed(step)
    model(torch.randn(2, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_steps(rank: int, world: int, folder: str, kind: str, steps: list[int]) -> None:
    """Saves of what nobody has trained."""
    model, _ = adapted()
    wrapped: nn.Module = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    for step in steps:
        ucp.save(wrapped, f"{folder}/step-{step}", step=step, share=True)
