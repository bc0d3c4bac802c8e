"""What the ranks of Accelerate's tests run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor

import ucp
from ucp.integrations.accelerate import load_state, register, save_state, state_of

WIDTH = 6


class Counter:
    """An object registered for checkpointing."""

    def __init__(self) -> None:
        self.tokens = 0

    def state_dict(self) -> dict[str, int]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.tokens = state["tokens"]


class Job:
    def __init__(self, layout: str, seed: int = 0) -> None:
        warnings.simplefilter("ignore")
        self.accelerator = Accelerator(cpu=True)
        if layout == "fsdp2":
            # Accelerate shards on accelerators alone (accelerate/state.py); what it does then works on a CPU as well.
            PartialState().distributed_type = DistributedType.FSDP
            state: Any = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(WIDTH, 10), nn.GELU(), nn.Linear(10, WIDTH))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        assert (layout == "fsdp2") == all(isinstance(each, DTensor) for each in self.model.parameters())
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
            loss = (self.model(x) - x.flip(1)).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.scheduler.step()
            self.optimizer.zero_grad()
            self.counter.tokens += 8

    def state(self) -> dict[str, Any]:
        names = {parameter: name.removeprefix("module.") for name, parameter in self.model.named_parameters()}
        found: dict[str, Any] = {name: parameter for parameter, name in names.items()}
        for parameter, held in self.optimizer.optimizer.state.items():
            found |= {f"{names[parameter]}/{key}": value for key, value in held.items()}
        whole = {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for n, v in found.items()}
        return {**whole, "lr": self.optimizer.param_groups[0]["lr"], "tokens": self.counter.tokens}


def first_part(rank: int, world: int, url: str, layout: str) -> Any:
    job = Job(layout)
    job.train(1, 4)
    save_state(job.accelerator, url, step=4)
    return job.state()


def second_part(rank: int, world: int, url: str, layout: str) -> Any:
    job = Job(layout, seed=9)
    report = load_state(job.accelerator, url)
    assert report.step == 4
    loaded = job.state()
    job.train(5, 8)
    return loaded, job.state()


def whole(rank: int, world: int, layout: str) -> Any:
    job = Job(layout)
    job.train(1, 8)
    return job.state()


def with_manager(rank: int, world: int, url: str) -> Any:
    job = Job("ddp")
    with ucp.CheckpointManager(url, every=2) as manager:
        for step in range(1, 5):
            job.train(step, step)
            manager.step(step, state_of(job.accelerator))
        again = Job("ddp", seed=9)
        resumed = manager.resume(state_of(again.accelerator))
    assert resumed is not None
    return resumed.step, job.state(), again.state()


def hooks(rank: int, world: int, folder: str) -> Any:
    job = Job("ddp")
    handles = register(job.accelerator)
    job.train(1, 2)
    job.accelerator.save_state(folder)
    job.train(3, 4)
    job.accelerator.save_state(folder)
    weights = [path.name for path in Path(folder).glob("model*")]
    kept = job.state()
    job.train(5, 6)
    job.accelerator.load_state(folder)
    for handle in handles:
        handle.remove()
    return kept, job.state(), weights


def hooks_refused(rank: int, world: int) -> str:
    job = Job("fsdp2")
    try:
        register(job.accelerator)
    except ucp.UsageError as error:
        return f"{error} {error.hint}"
    return ""
