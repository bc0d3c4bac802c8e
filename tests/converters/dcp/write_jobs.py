"""What the ranks of the tests run: stock jobs that load a folder with ``dcp.load`` and go on training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from tests.support.model import Block, build_model, group_names
from tests.train import jobs
from ucp.integrations.dcp import Reader

HYPER = (
    {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
    {"lr": 4e-3, "betas": (0.9, 0.99), "weight_decay": 0.0},
    {"lr": 2e-3, "betas": (0.8, 0.9), "weight_decay": 0.01},
)


def build(kind: str) -> nn.Module:
    return build_model(seed=7, unused=True) if kind == "unused" else jobs.build(kind)


def optimizer_of(model: nn.Module, names: list[list[str]], **options: Any) -> torch.optim.Optimizer:
    """AdamW over groups of parameters by name, whatever the model is wrapped in."""
    named = {
        name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): p for name, p in model.named_parameters()
    }
    groups = [{"params": [named[name] for name in group], **HYPER[i]} for i, group in enumerate(names)]
    return torch.optim.AdamW([{**group, **options} for group in groups], foreach=False)


def wrapped(model: nn.Module, layout: str, world: int) -> nn.Module:
    if layout == "plain":
        return model
    if layout == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if layout == "fsdp1":
        mesh = init_device_mesh("cpu", (world,))
        policy = ModuleWrapPolicy({Block})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_mesh=mesh, device_id=torch.device("cpu")
        )
    return jobs.shard(model, layout, world)


def resume(rank: int, world: int, url: str, kind: str, layout: str, flat: bool, first: int) -> dict[str, Any]:
    """Load strictly into a job full of other numbers; give all that it then holds, and its next losses."""
    torch.manual_seed(100 + rank)
    model = build(kind)
    names = group_names(model, 2)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(9)
    model = wrapped(model, layout, world)
    optimizer = optimizer_of(model, names, lr=9.0, weight_decay=9.0, betas=(0.1, 0.2), eps=1.0)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    values, states = get_state_dict(model, optimizer, options=options)
    held = {"model": values, "optim": states}
    dcp.load(held, checkpoint_id=url)
    set_state_dict(model, optimizer, model_state_dict=values, optim_state_dict=states, options=options)
    state = whole_state(model, optimizer)
    return {
        "state": state,
        "hyper": hyper(optimizer),
        "losses": [jobs.train_step(model, optimizer, step) for step in range(first, first + 3)],
    }


def train_and_save(rank: int, world: int, url: str, kind: str, layout: str, steps: int) -> dict[str, Any]:
    """Train from the start and save with ``dcp.save``; give all that the job holds, and its next losses."""
    model = build(kind)
    names = group_names(model, 2)
    model = wrapped(model, layout, world)
    optimizer = optimizer_of(model, names)
    for step in range(steps):
        jobs.train_step(model, optimizer, step)
    values, states = get_state_dict(model, optimizer)
    dcp.save({"model": values, "optim": states, "app": {"step": steps, "note": "saved"}}, checkpoint_id=url)
    return {
        "state": whole_state(model, optimizer),
        "hyper": hyper(optimizer),
        "losses": [jobs.train_step(model, optimizer, step) for step in range(steps, steps + 3)],
    }


def hyper(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    """Hyper-parameters of each group."""
    return [(g["lr"], g["betas"], g["weight_decay"], g["eps"]) for g in optimizer.param_groups]


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that the job holds, by name, each tensor whole, as numpy."""
    values, states = get_state_dict(model, optimizer)
    found = {name: jobs.whole(value).numpy() for name, value in values.items()}
    for name, held in states["state"].items():
        found |= {f"{state}/{name}": jobs.whole(value).numpy() for state, value in held.items()}
    return found


def go_on_from_deepspeed(
    rank: int, world: int, url: str, case: Any, layout: str, first: int, ours: bool = False
) -> dict[str, Any]:
    """Resume a DeepSpeed job under stock torch from its checkpoint as a DCP folder, or, with our reader, as it is.

    Gives state, buffers and next losses.
    """
    torch.manual_seed(100 + rank)
    model: nn.Module = build_model(seed=99, tied=case.tied, frozen=case.frozen, unused=case.unused)
    names = group_names(model, case.groups)
    if layout != "plain":
        model = jobs.shard(model, layout, world)
    optimizer = optimizer_of(model, names, lr=9.0, weight_decay=9.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))
    values, states = get_state_dict(model, optimizer)
    held = {"model": values, "optim": states, "lr_scheduler": scheduler.state_dict()}
    dcp.load(held, storage_reader=Reader(url)) if ours else dcp.load(held, checkpoint_id=url)
    set_state_dict(model, optimizer, model_state_dict=values, optim_state_dict=states)
    scheduler.load_state_dict(held["lr_scheduler"])
    return {
        "state": whole_state(model, optimizer),
        "hyper": [(group["lr"], group["weight_decay"], group["initial_lr"]) for group in optimizer.param_groups],
        "losses": [jobs._clipped_step(model, optimizer, scheduler, n, rank, world) for n in range(first, first + 3)],
    }
