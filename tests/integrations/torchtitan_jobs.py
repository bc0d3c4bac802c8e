"""What ranks do in the tests of torchtitan's checkpointer: its own containers around a small model under FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer.optimizer import ParamGroupConfig

import ucp
from tests.support import dcp_jobs
from tests.support.dcp_jobs import Job, Truth
from tests.support.dcp_model import Model
from ucp.integrations.torchtitan import CheckpointManager


class Counter:
    """A part of the job with a state of its own, as torchtitan's trainer and data loader have one."""

    def __init__(self, key: str, value: Any) -> None:
        self.key, self.value = key, value

    def state_dict(self) -> dict[str, Any]:
        return {self.key: self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state[self.key]


class Titan:
    """A job as torchtitan's trainer puts one together."""

    def __init__(self, seed: int, rank: int, shape: tuple[int, ...], folder: str, **options: Any) -> None:
        torch.manual_seed(seed)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        model = Model()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        groups = [
            ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs={"lr": lr, "weight_decay": 0.1})
            for pattern, lr in (("weight$", 0.02), (".*", 0.01))
        ]
        config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
        self.optimizers = config.build(model_parts=[model])
        self.schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.optimizers, training_steps=10
        )
        self.job = Job(model, self.optimizers.optimizers[0])
        self.step = Counter("step", torch.tensor(0, dtype=torch.int32))
        self.loader = Counter(f"dp_rank_{rank}", b"nothing")
        self.manager = CheckpointManager.Config(enable=True, interval=2, folder=folder, **options).build(
            dataloader=self.loader,
            model_parts=[model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.step},
            sd_adapter=None,
        )

    def train(self, rank: int, steps: int, *, last: bool = False) -> list[float]:
        losses = []
        for _ in range(steps):
            number = int(self.step.value)
            losses.append(dcp_jobs.train_step(self.job, rank, number))
            self.schedulers.step()
            self.step.value = torch.tensor(number + 1, dtype=torch.int32)
            self.loader.value = f"row {number} of {rank}".encode()
            self.manager.save(number + 1, last_step=last and number + 1 == steps)
        self.manager.maybe_wait_for_saving()
        return losses

    def held(self) -> tuple[Truth, list[float], int]:
        rates = [group["lr"] for group in self.job.optimizer.param_groups]
        return dcp_jobs.truth_of(self.job), rates, int(self.step.value)


def first(rank: int, world: int, folder: str, mode: str) -> tuple[Any, list[float]]:
    """Train from the start for four steps, saving every second; what was held then, and the losses of two more."""
    titan = Titan(7, rank, (world,), folder, async_mode=mode)
    assert not titan.manager.load()
    titan.train(rank, 4)
    held = titan.held()
    titan.manager.interval = 100
    losses = titan.train(rank, 2)
    titan.manager.close()
    return held, losses


def second(rank: int, world: int, folder: str, options: dict[str, Any]) -> tuple[Any, list[float], bytes]:
    """Go on from there on another mesh; what is held then, the next two losses, and what the loader has."""
    titan = Titan(99, rank, (2, world // 2), folder, exclude_from_loading=options.pop("exclude", []), **options)
    assert titan.manager.load()
    held, place = titan.held(), titan.loader.value
    titan.manager.interval = 100
    losses = titan.train(rank, 2)
    titan.manager.close()
    distributed.barrier()
    return held, losses, place


def last(rank: int, world: int, folder: str) -> list[str]:
    """The names in the checkpoint of a last step, which has the weights alone."""
    titan = Titan(7, rank, (world,), folder, export_dtype="bfloat16")
    titan.train(rank, 3, last=True)
    titan.manager.close()
    with ucp.open(f"{folder}/step-3") as ckpt:
        return [f"{name} {tensor.dtype} {' '.join(tensor)}" for name, tensor in ckpt.items()]
