"""Jobs that train a little under every layout and save with the real torch.distributed.checkpoint. Run inside ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.support.dcp_model import VOCAB, Block, Model, clean, optimizer_of

STEPS = 2


class Kept(NamedTuple):
    """One tensor as the job had it."""

    shape: tuple[int, ...]
    dtype: str
    data: bytes


Truth = dict[str, dict[str, Kept]]


class Job(NamedTuple):
    """A model that is sharded already, and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


class Saved(NamedTuple):
    """What a job had when it saved: all tensors by clean name and state, groups by name, and the optimizer's steps."""

    truth: Truth
    groups: list[tuple[list[str], float]]
    losses: list[float]


def run_all(rank: int, world: int, root: str, layouts: list[str]) -> dict[str, Saved]:
    """Run the job of each layout after another and save below ``root/<layout>``."""
    return {layout: run(rank, world, f"{root}/{layout}", layout) for layout in layouts}


def run(rank: int, world: int, folder: str, layout: str) -> Saved:
    """Train with `layout`, save to `folder`, and tell the truth."""
    torch.manual_seed(7)
    job = LAYOUTS[layout](world)
    losses = [train_step(job, rank, step) for step in range(STEPS)]
    saved = Saved(truth_of(job), _groups(job), losses)
    SAVES.get(layout, save_nested)(job, folder)
    distributed.barrier()
    return saved


def train_step(job: Job, rank: int, step: int) -> float:
    """One step on a batch of this rank's own; tensor-parallel ranks get it wrong, but all alike."""
    tokens = torch.randint(0, VOCAB, (6,), generator=torch.Generator().manual_seed(step))
    loss = job.model(tokens)
    loss.backward()
    job.optimizer.step()
    job.optimizer.zero_grad()
    return float(loss.full_tensor() if isinstance(loss, DTensor) else loss)


# Layouts.


def fsdp2(world: int, *, dtype: torch.dtype | None = None, experts: bool = False) -> Job:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    model = Model(experts=experts)
    if dtype is not None:
        model.to(dtype)
    return _fully_sharded(model, mesh)


def tied(world: int) -> Job:
    return _fully_sharded(Model(tied=True), init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))


def hsdp(world: int) -> Job:
    return _fully_sharded(Model(), init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))


def fsdp2_tp(world: int) -> Job:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = Model()
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(model, mesh["tp"], {"embed": rows})
    return _fully_sharded(model, mesh["dp"])


def fsdp2_ep(world: int) -> Job:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("efsdp", "ep"))
    model = Model(experts=True)
    assert model.experts is not None
    model.experts.w = nn.Parameter(distribute_tensor(model.experts.w.data, mesh["ep"], [Shard(0)]))
    fully_shard(model.experts, mesh=mesh["efsdp"])
    return _fully_sharded(model, init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))


def fsdp1(world: int, *, original: bool = True) -> Job:
    del world
    plain = Model(frozen=original)
    dims = {name: p.ndim for name, p in plain.named_parameters()}
    model = FullyShardedDataParallel(
        plain,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )
    return Job(model, optimizer_of(model, dims))


def ddp(world: int) -> Job:
    del world
    model = DistributedDataParallel(Model())
    return Job(model, optimizer_of(model))


def _fully_sharded(model: Model, mesh: Any) -> Job:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Job(model, optimizer_of(model))


# Ways to save.


def save_nested(job: Job, folder: str) -> None:
    dcp.save(_nested(job), checkpoint_id=folder)


def _nested(job: Job) -> dict[str, Any]:
    model, optimizer = get_state_dict(job.model, job.optimizer)
    schedule = {"last_epoch": STEPS, "base_lrs": [1e-2, 4e-3]}
    around = {"step": STEPS, "rng": torch.get_rng_state(), "note": "kept", "lr_scheduler": schedule}
    return {"model": model, "optim": optimizer, "extra": around}


def save_flat(job: Job, folder: str) -> None:
    """As torchtitan: the model at the top, optimizer states flattened."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = get_state_dict(job.model, job.optimizer, options=options)
    progress = {"step": torch.tensor(STEPS, dtype=torch.int32), "ntokens_seen": torch.tensor(99)}
    loader = {"dp_rank_0": b"rows 0 to 9", "world_size": 1}
    dcp.save(
        {
            **model,
            "optimizer": optimizer,
            "lr_scheduler": {"last_epoch": STEPS},
            "train_state": progress,
            "dataloader": loader,
        },
        checkpoint_id=folder,
    )


def save_all_flat(job: Job, folder: str) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = get_state_dict(job.model, job.optimizer, options=options)
    dcp.save({**model, **optimizer}, checkpoint_id=folder)


def save_wrapped(job: Job, folder: str) -> None:
    model, optimizer = get_state_dict(job.model, job.optimizer)
    dcp.save({"app": {"model": model, "optimizer": optimizer}, "epoch": 4}, checkpoint_id=folder)


def save_numbered(job: Job, folder: str) -> None:
    """With the optimizer's own state dict, which numbers parameters."""
    dcp.save({"model": get_model_state_dict(job.model), "optimizer": job.optimizer.state_dict()}, checkpoint_id=folder)


def save_plain(job: Job, folder: str) -> None:
    """With the wrapped module's own names."""
    dcp.save({"state_dict": job.model.state_dict(), "optimizer": job.optimizer.state_dict()}, checkpoint_id=folder)


def save_model_only(job: Job, folder: str) -> None:
    dcp.save({"model": get_model_state_dict(job.model)}, checkpoint_id=folder)


def save_async(job: Job, folder: str) -> None:
    dcp.async_save(_nested(job), checkpoint_id=folder).result()


def save_file_per_tensor(job: Job, folder: str) -> None:
    dcp.save(_nested(job), storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=False))


def save_by_threads(job: Job, folder: str) -> None:
    dcp.save(_nested(job), storage_writer=dcp.FileSystemWriter(folder, thread_count=3))


def save_accelerate(job: Job, folder: str) -> None:
    """With Accelerate's own functions, which want no more of an Accelerator than the rank."""
    import accelerate
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp_utils

    state = accelerate.PartialState(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    fsdp_utils.save_fsdp_model(plugin, state, job.model, folder)
    fsdp_utils.save_fsdp_optimizer(plugin, state, job.optimizer, job.model, folder)


LAYOUTS: dict[str, Callable[[int], Job]] = {
    "fsdp2": fsdp2,
    "fsdp2_bf16": lambda world: fsdp2(world, dtype=torch.bfloat16),
    "tied": tied,
    "hsdp": hsdp,
    "fsdp2_tp": fsdp2_tp,
    "fsdp2_ep": fsdp2_ep,
    "fsdp1": fsdp1,
    "fsdp1_flat_parameter": lambda world: fsdp1(world, original=False),
    "ddp": ddp,
    "ddp_plain": ddp,
    "torchtitan": fsdp2,
    "all_flat": ddp,
    "wrapped": fsdp2,
    "numbered": fsdp2,
    "model_only": fsdp2,
    "async": fsdp2,
    "file_per_tensor": fsdp2,
    "threads": fsdp2,
    "accelerate": fsdp2,
}
SAVES: dict[str, Callable[[Job, str], None]] = {
    "ddp_plain": save_plain,
    "torchtitan": save_flat,
    "all_flat": save_all_flat,
    "wrapped": save_wrapped,
    "numbered": save_numbered,
    "model_only": save_model_only,
    "async": save_async,
    "file_per_tensor": save_file_per_tensor,
    "threads": save_by_threads,
    "accelerate": save_accelerate,
}


# The truth, from the tensors themselves and not through state dicts.


def truth_of(job: Job) -> Truth:
    """Every parameter, its moments, and every buffer, whole; collective."""
    if isinstance(job.model, FullyShardedDataParallel):
        return _truth_of_fsdp1(job)
    found: Truth = {}
    for name, parameter in job.model.named_parameters():
        states = job.optimizer.state.get(parameter, {})
        tensors = {"value": parameter, **{key: states[key] for key in ("exp_avg", "exp_avg_sq") if key in states}}
        found[clean(name)] = {state: kept(tensor) for state, tensor in tensors.items()}
    for name, buffer in job.model.named_buffers():
        found[clean(name)] = {"value": kept(buffer)}
    return found


def _truth_of_fsdp1(job: Job) -> Truth:
    model, found = job.model, {}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            found[clean(name)] = {"value": kept(tensor)}
    for name, states in _gathered_moments(job).items():
        shape = found[name]["value"].shape
        for state, flat in states.items():
            found[name][state] = kept(flat.view(shape))
    return found


def _gathered_moments(job: Job) -> dict[str, dict[str, Tensor]]:
    """Moments of parameters of which each rank has a run of elements, in order of rank; {} for flat parameters."""
    local: dict[str, dict[str, Tensor]] = {}
    for name, parameter in job.model.named_parameters():
        if parameter.requires_grad and "_flat_param" not in name:
            states = job.optimizer.state.get(parameter, {})
            keys = ("exp_avg", "exp_avg_sq")
            local[clean(name)] = {key: states[key].flatten() if key in states else torch.zeros(0) for key in keys}
    ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(ranks, local)
    return {name: {key: torch.cat([own[name][key] for own in ranks]) for key in local[name]} for name in local}


def kept(tensor: Tensor) -> Kept:
    """`tensor` whole, as bytes; collective for a DTensor."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    # A copy: numpy keeps hold of the storage, and FSDP1 wants to free it.
    whole = whole.detach().clone(memory_format=torch.contiguous_format)
    data = whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
    return Kept(tuple(whole.shape), str(whole.dtype).removeprefix("torch."), data)


def _groups(job: Job) -> list[tuple[list[str], float]]:
    names = {id(parameter): clean(name) for name, parameter in job.model.named_parameters()}
    return [([names[id(p)] for p in group["params"]], group["weight_decay"]) for group in job.optimizer.param_groups]
