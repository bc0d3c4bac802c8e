"""Jobs of one model in every layout that torch has: what is saved and loaded, how it trains, and what is true of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.train.walk.net import DEPTH, Net, batch, loss_of
from ucp.train.names import stripped

CPU = torch.device("cpu")
Make = Callable[[Any], torch.optim.Optimizer]
State = dict[str, Tensor]


@dataclass
class Job:
    """`parts` are the modules of this rank, each with its own optimizer."""

    parts: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    schedule: Any = None

    @property
    def state(self) -> Any:
        """What `ucp` gets."""
        if len(self.parts) == 1:
            return (self.parts[0], self.optimizers[0])
        return {"model": self.parts, "optimizer": self.optimizers}

    def step(self, number: int) -> float:
        """One optimizer step; the loss, on the ranks that know it."""
        tokens, labels = batch(number)
        if self.schedule is not None:
            loss = self._pipelined(tokens, labels)
        else:
            found = loss_of(self.parts[0](tokens), labels)
            found.backward()
            loss = float(found.detach())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def _pipelined(self, tokens: Tensor, labels: Tensor) -> float:
        losses: list[Tensor] = []
        first = any(part.embed is not None for part in self.parts)  # type: ignore[union-attr]
        last = any(part.head is not None for part in self.parts)  # type: ignore[union-attr]
        kept = {"target": labels, "losses": losses} if last else {}
        self.schedule.step(*([tokens] if first else []), **kept)
        return float(torch.stack(losses).mean()) if last else float("nan")


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, foreach=False)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=0.01, foreach=False)


OPTIMIZERS: Mapping[str, Make] = {"adamw": adamw, "sgd": sgd, "adafactor": adafactor}


def build(layout: str, make: Make = adamw, *, seed: int, **options: Any) -> Job:
    """The job of this rank in `layout`, with weights from `seed`."""
    torch.manual_seed(seed)
    kind, _, variant = layout.partition(" ")
    return _JOBS[kind](make, variant, options)


def _alone(model: nn.Module, make: Make) -> Job:
    return Job([model], [make([p for p in model.parameters() if p.requires_grad])])


def _plain(make: Make, variant: str, options: dict[str, Any]) -> Job:
    model: nn.Module = Net(**options)
    if variant == "compiled":
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif variant == "recomputed":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for name, layer in list(model.layers.items()):  # type: ignore[operator, union-attr]
            model.layers[name] = checkpoint_wrapper(layer)  # type: ignore[index]
    return _alone(model, make)


def _ddp(make: Make, variant: str, options: dict[str, Any]) -> Job:
    return _alone(nn.parallel.DistributedDataParallel(Net(**options)), make)


STRATEGIES = {
    "full": ShardingStrategy.FULL_SHARD,
    "grad": ShardingStrategy.SHARD_GRAD_OP,
    "no": ShardingStrategy.NO_SHARD,
    "hybrid": ShardingStrategy.HYBRID_SHARD,
}


def _fsdp1(make: Make, variant: str, options: dict[str, Any]) -> Job:
    """Variants: "full" and others of `STRATEGIES`, "flat" (without the original parameters), "bf16", "flatwrap"."""
    words = variant.split()
    world = distributed.get_world_size()
    strategy = next(STRATEGIES[word] for word in words if word in STRATEGIES)
    mesh = (
        init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")) if "hybrid" in words else None
    )
    keywords: dict[str, Any] = {
        "sharding_strategy": strategy,
        "use_orig_params": "flat" not in words,
        "device_id": CPU,
        "device_mesh": mesh,
        "mixed_precision": MixedPrecision(param_dtype=torch.bfloat16) if "bf16" in words else None,
    }
    model = Net(**options)
    if model.positions is not None:
        model.positions = FullyShardedDataParallel(model.positions, **keywords)  # type: ignore[assignment]
    for name, layer in list(model.layers.items()):
        if name != "3":  # one that is a part of the root's flat parameter
            layer.up = FullyShardedDataParallel(layer.up, **keywords)
            model.layers[name] = FullyShardedDataParallel(layer, **keywords)
    return _alone(FullyShardedDataParallel(model, **keywords), make)


def _fsdp2(make: Make, variant: str, options: dict[str, Any]) -> Job:
    """Variants: "" and "hybrid"."""
    world = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    if variant == "hybrid":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    model = Net(**options)
    return _alone(_sharded(model, mesh), make)


def _sharded(model: Net, mesh: DeviceMesh) -> nn.Module:
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tp(make: Make, variant: str, options: dict[str, Any]) -> Job:
    """Tensor parallelism over 2, and with "fsdp" FSDP2 over the rest."""
    world = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = Net(**options)
    for layer in model.layers.values():
        parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return _alone(_sharded(model, mesh["dp"]) if variant == "fsdp" else model, make)


def _pp(make: Make, variant: str, options: dict[str, Any]) -> Job:
    """A pipeline over 2 ranks; "interleaved" has two stages on each, "fsdp" shards each stage over the others."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "dp"))
    place, group = mesh["pp"].get_local_rank(), mesh["pp"].get_group()
    each = 2 if "interleaved" in variant else 1
    stages = 2 * each
    size = DEPTH // stages
    parts: list[nn.Module] = []
    for stage in range(place, stages, 2):
        torch.manual_seed(97 + stage)  # ranks of one stage must begin alike
        part = Net(range(stage * size, (stage + 1) * size), **options)
        parts.append(_sharded(part, mesh["dp"]) if "fsdp" in variant else part)
    del rank
    held = [
        PipelineStage(part, number, stages, CPU, group=group)
        for part, number in zip(parts, range(place, stages, 2), strict=True)
    ]
    kept = {"n_microbatches": 2, "loss_fn": loss_of}
    schedule = ScheduleGPipe(held[0], **kept) if each == 1 else ScheduleInterleaved1F1B(held, **kept)  # type: ignore[arg-type]
    optimizers = [make([p for p in part.parameters() if p.requires_grad]) for part in parts]
    return Job(parts, optimizers, schedule)


_JOBS: Mapping[str, Callable[[Make, str, dict[str, Any]], Job]] = {
    "plain": _plain,
    "ddp": _ddp,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
    "tp": _tp,
    "pp": _pp,
}


def truth(job: Job) -> State:
    """Values and optimizer states of the whole job, put together by torch alone; the same on every rank."""
    found: State = {}
    for part, optimizer in zip(job.parts, job.optimizers, strict=True):
        if isinstance(part, FullyShardedDataParallel):
            found |= _truth_of_fsdp1(part, optimizer)
        else:
            found |= _truth_of(part, optimizer)
    everybody: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everybody, found)
    whole: State = {}
    for one in everybody:
        whole = {**one, **whole}
    # Where FSDP1 gathers a state, a number has become one for each element.
    return {name: value.reshape(-1)[:1] if name.startswith("step/") else value for name, value in whole.items()}


def _truth_of(part: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    found = {stripped(name): _whole(tensor) for name, tensor in part.named_buffers()}
    for name, parameter in part.named_parameters(remove_duplicate=False):
        found[stripped(name)] = _whole(parameter)
        for state, value in optimizer.state.get(parameter, {}).items():
            found[f"{state}/{stripped(name)}"] = _whole(value)
    return found


def _truth_of_fsdp1(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """FSDP1's own gathering, of each state in place of the values: its gathering of states is wrong on CPU."""
    found = _gathered(model)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in trained]
    known: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(known, list(dict.fromkeys(k for one in optimizer.state.values() for k in one)))
    buffers = {stripped(name) for name, _ in model.named_buffers()}
    frozen = (
        {name for name in found if name.startswith("positions")}
        if len(trained) < len(list(model.parameters()))
        else set()
    )
    for state in dict.fromkeys(state for one in known for state in one):
        with torch.no_grad():
            for parameter in trained:
                parameter.copy_(optimizer.state[parameter][state] if parameter.numel() else parameter)
        gathered = _gathered(model).items()
        found |= {f"{state}/{name}": value for name, value in gathered if name not in buffers | frozen}
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return found


def _gathered(model: nn.Module) -> State:
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        return {stripped(name): _whole(value) for name, value in model.state_dict().items()}


def _whole(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value)
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def differences(one: State, other: State) -> list[str]:
    """Names of what is not equal, bit for bit, and of what only one has."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name not in one or name not in other or not torch.equal(one[name], other[name])]
