"""The model of the elastic demo in the layout that a mesh tells, and the text it learns. Runs inside ranks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from ucp.demo.model import LENGTH, VOCAB, Block, build_model, param_groups

Kind = Literal["fsdp", "ddp"]
SAMPLES = 500
"""Samples of the text; no global batch divides it, so that steps run over the ends of epochs."""
WARM_UP, WHOLE = 8, 16
"""Steps until the learning rate is whole, and those after which it falls as one over their number.

Where it stays, training is chaotic: 1e-15 in a weight is 1e-3 in the loss of step 600, so that no loss would prove
anything. As it falls, 1e-15 is what it stays.
"""


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR


def build(mesh: DeviceMesh, *, kind: Kind = "fsdp", dtype: torch.dtype = torch.float64, layers: int = 2) -> Trained:
    """FSDP2 over the axis dp of `mesh`, with tensor parallelism where it has an axis tp; or DDP over dp.

    The weights are the same whatever the mesh, and other than those of any step: what is not loaded shows.
    """
    model = build_model(seed=1)
    model.blocks = nn.ModuleList(Block() for _ in range(layers))
    model.to(dtype)
    dp = mesh["dp"]
    wrapped: nn.Module = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model, process_group=dp.get_group())
    else:
        if mesh.size() > dp.size():
            _split(model.blocks, mesh["tp"])
        for block in model.blocks:
            fully_shard(block, mesh=dp)
        fully_shard(model, mesh=dp)
    optimizer = torch.optim.AdamW(param_groups(wrapped))
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP, WHOLE / (step + 1)))
    return Trained(wrapped, optimizer, scheduler)


def _split(blocks: nn.ModuleList, tp: DeviceMesh) -> None:
    for block in blocks:
        parallelize_module(block, tp, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()})


class Text(Dataset[tuple[Tensor, Tensor]]):
    """`SAMPLES` samples, tokens and labels ``[LENGTH]`` each; a token has a successor that mostly follows it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        successor = torch.randint(VOCAB, (VOCAB,), generator=generator)
        tokens = torch.randint(VOCAB, (SAMPLES, LENGTH + 1), generator=generator)
        follows = torch.rand(SAMPLES, LENGTH + 1, generator=generator) < 0.9
        for i in range(1, LENGTH + 1):
            tokens[:, i] = torch.where(follows[:, i], successor[tokens[:, i - 1]], tokens[:, i])
        self.tokens = tokens

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, sample: int) -> tuple[Tensor, Tensor]:
        return self.tokens[sample, :-1], self.tokens[sample, 1:]
