"""What the ranks of the Lightning tests run."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import ucp
from ucp.integrations.lightning import UcpCheckpoint, UcpCheckpointIO

WIDTH, BATCHES = 6, 8


class Net(LightningModule):
    """Its batches depend on the step alone, so that runs of any number of ranks see the same."""

    def __init__(self, *, sharded: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, 10), nn.GELU(), nn.Linear(10, WIDTH))
        self.sharded = sharded
        self.seen: list[int] = []

    def configure_model(self) -> None:
        if self.sharded and not any(isinstance(p, DTensor) for p in self.parameters()):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        step = self.trainer.global_step
        self.seen.append(step)
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = (self.net(x) - x.flip(1)).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, foreach=False)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(BATCHES * int(os.environ.get("WORLD_SIZE", "1"))), batch_size=1)


class Stop(Callback):
    """A signal to one rank in the middle of a step."""

    def __init__(self, rank: int, at: int) -> None:
        self.rank, self.at = rank, at

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class Counted(Callback):
    """Has a state of its own."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


def trainer_of(world: int, strategy: str, steps: int, callbacks: list[Any], **options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    kinds: dict[str, Any] = {
        "single": lambda: SingleDeviceStrategy("cpu"),
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
    }
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **options}
    devices = 1 if strategy == "single" else world
    return Trainer(
        accelerator="cpu", devices=devices, strategy=kinds[strategy](), max_steps=steps, callbacks=callbacks, **options
    )


def states_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = dict(module.named_parameters())
    for name, parameter in module.named_parameters():
        found |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in found.items()
    }


def fit(rank: int, world: int, url: str, strategy: str, steps: int, told: int | None = None) -> Any:
    """Train up to `steps`, going on with what there is; `told` gets a signal to end in the fifth step."""
    module, counted = Net(sharded=strategy == "fsdp2"), Counted()
    checkpoint = UcpCheckpoint(url, every=2, keep_latest=2, best=("loss", "min"))
    stop = [] if told is None else [Stop(told, 4)]
    trainer = trainer_of(world, strategy, steps, [checkpoint, counted, *stop])
    trainer.fit(module)
    resumed = None if checkpoint.resumed is None else checkpoint.resumed.step
    (optimizer,) = trainer.optimizers
    return {
        "resumed": resumed,
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "seen": module.seen,
        "batches": counted.batches,
        "lr": optimizer.param_groups[0]["lr"],
        "state": states_of(module, optimizer),
        "preempted": checkpoint.manager.preempted,
        "restored": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "saved": [saved.step for saved in checkpoint.manager.saved],
        "best": checkpoint.manager.best,
    }


def fit_with_files(rank: int, world: int, folder: str, strategy: str, steps: int, source: str | None) -> Any:
    """Train with Lightning's own ModelCheckpoint, its files being ucp's."""
    module = Net()
    keep = ModelCheckpoint(folder, filename="at-{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = trainer_of(world, strategy, steps, [keep], plugins=[UcpCheckpointIO()])
    trainer.fit(module, ckpt_path=source)
    last = max(Path(folder).iterdir(), key=lambda path: int(path.stem.rpartition("=")[2]))
    opened = ucp.open(last)
    weights = opened.state_dict()
    same = opened.step == steps and all(torch.equal(weights[n], p.detach()) for n, p in module.named_parameters())
    return module.seen, states_of(module, trainer.optimizers[0]), same
