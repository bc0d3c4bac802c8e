"""The model in every layout: what `ucp` gets of it, and how it makes a step. Run by the ranks of a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.layouts.lm import DEPTH, GLOBAL_BATCH, Model, batch, build, loss_of, optimizer_of

CPU = torch.device("cpu")


@dataclass
class Job:
    """`state` is what is saved and loaded, `step` makes one and tells the loss of the whole batch."""

    state: Any
    step: Callable[[int], float]


@dataclass(frozen=True)
class Layout:
    """A way to run the model on `world` ranks. `make` builds the job of one rank with weights from a seed."""

    name: str
    world: int
    make: Callable[[int], Job]
    needs_deepspeed: bool = False


def _simple(model: nn.Module, *, rank: int, world: int) -> Job:
    """Data-parallel `rank` of `world`; the framework sums up gradients."""
    optimizer = optimizer_of(model)

    def step(number: int) -> float:
        tokens, labels = batch(number, rank=rank, world=world)
        loss = loss_of(model(tokens), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return _mean(loss)

    return Job((model, optimizer), step)


def _mean(loss: Tensor) -> float:
    total = loss.detach().clone()
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()


def _me() -> dict[str, int]:
    return {"rank": distributed.get_rank(), "world": distributed.get_world_size()}


def ddp(seed: int) -> Job:
    return _simple(nn.parallel.DistributedDataParallel(build(seed)), **_me())


def fsdp1(seed: int, *, originals: bool) -> Job:
    model = build(seed)
    keywords: dict[str, Any] = {"use_orig_params": originals, "device_id": CPU}
    for number, block in list(model.blocks.items()):
        model.blocks[number] = FullyShardedDataParallel(block, **keywords)
    return _simple(FullyShardedDataParallel(model, **keywords), **_me())


def fsdp2(seed: int) -> Job:
    return _simple(_sharded(build(seed), None), **_me())


def hsdp(seed: int) -> Job:
    mesh = init_device_mesh("cpu", (2, distributed.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return _simple(_sharded(build(seed), mesh), **_me())


def _sharded(model: Model, mesh: DeviceMesh | None) -> Model:
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _cut(model: Model, mesh: DeviceMesh) -> Model:
    columns, rows = ColwiseParallel, RowwiseParallel
    for block in model.blocks.values():
        plan = {f"attention.{name}": columns() for name in "qkv"}
        parallelize_module(block, mesh, {**plan, "attention.out": rows(), "up": columns(), "down": rows()})
    return model


def tp(seed: int) -> Job:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tp",))
    return _simple(_cut(build(seed), mesh), rank=0, world=1)


def fsdp2_tp(seed: int) -> Job:
    mesh = init_device_mesh("cpu", (distributed.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = _sharded(_cut(build(seed), mesh["tp"]), mesh["dp"])
    return _simple(model, rank=mesh["dp"].get_local_rank(), world=mesh["dp"].size())


def ep(seed: int) -> Job:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("ep",))
    model = build(seed)
    for block in model.blocks.values():
        for name in ("up", "down"):
            whole = getattr(block.experts, name)
            setattr(block.experts, name, nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)])))
    return _simple(model, rank=0, world=1)


def pp(seed: int, *, dp: int = 1, tp: int = 1) -> Job:
    """A pipeline, each stage of which may be cut by tensor parallelism and sharded by FSDP2."""
    stages = distributed.get_world_size() // (dp * tp)
    mesh = init_device_mesh("cpu", (stages, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
    stage, depth = mesh["pp"].get_local_rank(), DEPTH // stages
    model = build(seed, range(stage * depth, (stage + 1) * depth))
    if tp > 1:
        _cut(model, mesh["tp"])
    if dp > 1:
        _sharded(model, mesh["dp"])
    optimizer = optimizer_of(model)
    held = PipelineStage(model, stage, stages, CPU, group=mesh["pp"].get_group())
    schedule = ScheduleGPipe(held, n_microbatches=2, loss_fn=loss_of)
    first, last = stage == 0, stage == stages - 1

    def step(number: int) -> float:
        tokens, labels = batch(number, rank=mesh["dp"].get_local_rank(), world=dp)
        losses: list[Tensor] = []
        schedule.step(*([tokens] if first else []), **({"target": labels, "losses": losses} if last else {}))
        optimizer.step()
        optimizer.zero_grad()
        total = torch.stack(losses).mean() if last else torch.zeros(())
        return _mean(total) * stages

    return Job((model, optimizer), step)


def zero(seed: int, *, stage: int) -> Job:
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    model = build(seed)
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    me = _me()

    def step(number: int) -> float:
        tokens, labels = batch(number, **me)
        loss = loss_of(engine(tokens), labels)
        engine.backward(loss)
        engine.step()
        return _mean(loss)

    return Job(engine, step)


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("DDP on 2", 2, ddp),
        Layout("FSDP1 on 3", 3, lambda seed: fsdp1(seed, originals=False)),
        Layout("FSDP1 on 2, original parameters", 2, lambda seed: fsdp1(seed, originals=True)),
        Layout("FSDP2 on 2", 2, fsdp2),
        Layout("FSDP2 on 4", 4, fsdp2),
        Layout("HSDP 2×2", 4, hsdp),
        Layout("TP 2", 2, tp),
        Layout("FSDP2 2 × TP 2", 4, fsdp2_tp),
        Layout("FSDP2 4 × TP 2", 8, fsdp2_tp),
        Layout("EP 2", 2, ep),
        Layout("PP 2", 2, pp),
        Layout("PP 4", 4, pp),
        Layout("PP 2 × FSDP2 2", 4, lambda seed: pp(seed, dp=2)),
        Layout("PP 2 × FSDP2 2 × TP 2", 8, lambda seed: pp(seed, dp=2, tp=2)),
        Layout("ZeRO-1 on 2", 2, lambda seed: zero(seed, stage=1), needs_deepspeed=True),
        Layout("ZeRO-2 on 3", 3, lambda seed: zero(seed, stage=2), needs_deepspeed=True),
        Layout("ZeRO-3 on 4", 4, lambda seed: zero(seed, stage=3), needs_deepspeed=True),
    )
}
