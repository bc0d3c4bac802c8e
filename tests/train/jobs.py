"""What the ranks of the distributed tests run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ucp
from tests.support.model import batch, build_model, local_batch, param_groups
from tests.train.handmade import Counting
from ucp.checkpoint import Checkpoint


class Perceptron(nn.Module):
    """Sizes that tensor parallelism over 2 can cut, and FSDP over 2 after it only unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Perceptron() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model), foreach=False)


def build(kind: str) -> nn.Module:
    if kind == "lm":
        return build_model(seed=7)
    torch.manual_seed(3)
    return Stack()


def loss_of(model: nn.Module, step: int) -> Tensor:
    if isinstance(model, Stack):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.flip(0)).square().mean()
    tokens, labels = batch(step)
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), labels.flatten())


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    loss = loss_of(model, step)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def shard(model: nn.Module, layout: str, world: int) -> nn.Module:
    blocks = list(model.layers if isinstance(model, Stack) else model.blocks)
    mesh = None
    if layout in ("tp", "fsdp+tp"):
        axes = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in blocks:
            parallelize_module(block, axes["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if layout == "tp":
            return model
        mesh = axes["dp"]
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def of_all(count: int) -> int:
    """The sum over all ranks."""
    total = torch.tensor(count)
    torch.distributed.all_reduce(total)
    return int(total)


def resume(rank: int, world: int, source: Any, kind: str, layout: str, steps: int) -> dict[str, Any]:
    """Load into a sharded model and optimizer; return everything whole, the next losses, and the bytes read."""
    torch.manual_seed(100 + rank)
    model = build(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    model = shard(model, layout, world)
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group.update(lr=9.0, weight_decay=9.0)
    ckpt, store = _open(source)
    report = ucp.load((model, optimizer), ckpt, verify=False)
    named = dict(model.named_parameters())
    states = {
        f"{state}/{name}": value
        for name, parameter in named.items()
        for state, value in optimizer.state.get(parameter, {}).items()
    }
    layouts = all(
        value.placements == named[key.partition("/")[2]].placements
        for key, value in states.items()
        if isinstance(value, DTensor)
    )
    whole_state = {key: whole(value) for key, value in {**named, **states, **dict(model.named_buffers())}.items()}
    losses = [train_step(model, optimizer, step) for step in range(steps, steps + 3)]
    return {
        "state": {key: value.numpy() for key, value in whole_state.items()},
        "sharded": sum(isinstance(value, DTensor) for value in (*named.values(), *states.values())),
        "layouts": layouts,
        "losses": losses,
        "bytes": (of_all(store.bytes_read), report.bytes_of_job),
        "hyper": [(group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups],
    }


def _open(source: Any) -> tuple[Checkpoint, Counting]:
    ckpt = source if isinstance(source, Checkpoint) else ucp.open(source)
    store = Counting(ckpt.store)
    return replace(ckpt, store=store), store


def round_to_bfloat16(rank: int, world: int, source: Any) -> bool:
    model = shard(build("lm").bfloat16(), "fsdp", world)
    ucp.load(model, source)
    ckpt, _ = _open(source)
    return all(
        torch.equal(whole(parameter), ckpt[name]["value"][...].bfloat16())
        for name, parameter in model.named_parameters()
    )


def load_after_forward(rank: int, world: int, source: Any) -> list[str]:
    """FSDP2 keeps the root's parameters gathered after a forward pass; a load must not write into that copy.

    Returns the names of parameters whose shards, which are what training goes on with, were not loaded.
    """
    model = shard(build("lm"), "fsdp", world)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loss_of(model, 0)
    assert not isinstance(model.embed.weight, DTensor), "nothing is gathered: this test shows nothing"
    ucp.load(model, source)
    model.reshard()
    return [name for name, p in model.named_parameters() if not torch.equal(whole(p), source[name]["value"][...])]


def placements(rank: int, world: int, source: Checkpoint) -> list[str]:
    """Every placement of a matrix on a 2x2 mesh, from a source cut another way; returns what came out wrong."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, world // 2))
    truth = source["w"]["value"][...]
    wrong = []
    for first in (Replicate(), Shard(0), Shard(1), Shard(2)):
        for second in (Replicate(), Shard(0), Shard(1), Shard(2)):
            target = distribute_tensor(torch.zeros_like(truth), mesh, (first, second))
            ucp.load({"w": target}, source)
            if not torch.equal(target.full_tensor(), truth):
                wrong.append(f"{first} {second}")
    # Interleaved rows: the local tensor is several boxes of the whole one.
    for factor in (2, 3):
        placement = _StridedShard(0, split_factor=factor)
        rows = torch.arange(truth.shape[0])
        pieces, _ = placement._split_tensor(rows, 2, with_padding=False)
        local = torch.zeros(len(pieces[mesh.get_coordinate()[0]]), *truth.shape[1:])
        target = DTensor.from_local(
            local, mesh, (placement, Replicate()), run_check=False, shape=truth.shape, stride=truth.stride()
        )
        ucp.load({"w": target}, source)
        if not torch.equal(target.to_local(), truth[pieces[mesh.get_coordinate()[0]]]):
            wrong.append(f"interleaved {factor}")
    return wrong


def partial(rank: int, world: int, source: Checkpoint) -> str:
    mesh = init_device_mesh("cpu", (world,))
    target = DTensor.from_local(torch.zeros(source["w"].shape), mesh, (Partial(),), run_check=False)
    try:
        ucp.load({"w": target}, source)
    except ucp.FitError as error:
        return str(error)
    return "no error"


def columns_of_a_large_matrix(rank: int, world: int, source: Checkpoint) -> tuple[int, int, bool]:
    ckpt, store = _open(source)
    mesh = init_device_mesh("cpu", (world,))
    truth = ckpt["w"]["value"][...]
    store.bytes_read = 0
    target = distribute_tensor(torch.zeros_like(truth), mesh, (Shard(1),))
    ucp.load({"w": target}, ckpt, verify=False)
    return store.bytes_read, target.to_local().nbytes, torch.equal(target.full_tensor(), truth)


def go_on_from_deepspeed(rank: int, world: int, url: str, case: Any, layout: str, first: int) -> dict[str, Any]:
    """Resume a DeepSpeed job under torch alone, from its own folder: state after loading, losses, bytes read."""
    torch.manual_seed(100 + rank)
    model: nn.Module = build_model(seed=99, tied=case.tied, frozen=case.frozen, unused=case.unused)
    if layout != "plain":
        model = shard(model, layout, world)
    groups = param_groups(model, groups=case.groups)
    if case.optimizer == "sgd":
        groups = [{key: value for key, value in group.items() if key != "betas"} for group in groups]
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[case.optimizer]
    optimizer = kind([{**group, "lr": 9.0, "weight_decay": 9.0} for group in groups])
    if case.optimizer == "sgd":
        optimizer.param_groups[0]["momentum"] = 0.5
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))
    ckpt, store = _open(url)
    report = ucp.load({"model": model, "optimizer": optimizer, "lr_scheduler": schedule}, ckpt, verify=False)
    named = dict(model.named_parameters())
    state = {f"param/{name}": whole(parameter) for name, parameter in named.items()}
    for name, parameter in named.items():
        state |= {f"{key}/{name}": whole(value) for key, value in optimizer.state.get(parameter, {}).items()}
    tensors = [*named.values(), model.drift, model.calls]
    tensors += [v for held in optimizer.state.values() for k, v in held.items() if k != "step"]
    return {
        "state": {key: value.numpy() for key, value in state.items()},
        "buffers": {"drift": model.drift.numpy().copy(), "calls": model.calls.numpy().copy()},
        "bytes": (of_all(store.bytes_read), report.bytes_of_job, sum(t.numel() * t.element_size() for t in tensors)),
        "hyper": [(group["lr"], group["weight_decay"], group["initial_lr"]) for group in optimizer.param_groups],
        "losses": [_clipped_step(model, optimizer, schedule, step, rank, world) for step in range(first, first + 3)],
    }


def _clipped_step(model: Any, optimizer: Any, schedule: Any, step: int, rank: int, world: int) -> float:
    tokens, labels = local_batch(step, rank=rank, world=world)
    loss = model(tokens, labels)
    loss.backward()
    if not isinstance(model, FSDPModule):
        for parameter in model.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    mean = loss.detach().double().clone()
    torch.distributed.all_reduce(mean)
    return mean.item() / world


def bfloat16_from_deepspeed(rank: int, world: int, url: str, case: Any) -> dict[str, Any]:
    """The working copy that a bf16 job computes with, made from the fp32 masters."""
    model = shard(
        build_model(seed=99, tied=case.tied, frozen=case.frozen, unused=case.unused).bfloat16(), "fsdp", world
    )
    ucp.load(model, url)
    return {name: whole(parameter).view(torch.int16).numpy() for name, parameter in model.named_parameters()}


def damaged(rank: int, world: int, source: Checkpoint, layout: str) -> tuple[str, int]:
    """What a rank says of a damaged source, and the parameters for which its optimizer has a state after it."""
    model = shard(build("lm"), layout, world)
    optimizer = optimizer_of(model)
    try:
        ucp.load((model, optimizer), source)
    except ucp.UcpError as error:
        return f"{type(error).__name__}: {error}", len(optimizer.state)
    return "nothing", len(optimizer.state)


def checked(rank: int, world: int, source: Checkpoint, layout: str) -> tuple[int, int, int]:
    """Bytes read by this rank, bytes checked by all of them, and all bytes under checksums."""
    model = shard(build("lm"), layout, world)
    report = ucp.load((model, optimizer_of(model)), source)
    return report.bytes_read, report.bytes_checked, sum(c.length for c in source.catalog.checksums)


def each_for_itself(
    rank: int, world: int, source: Checkpoint, seen: Checkpoint | None
) -> tuple[str, int, dict[str, Any]]:
    """What a rank says of a source of which the last rank sees the copy `seen`; bytes from others, and what it holds.

    All read all of it, and nobody hears of it what another one has read.
    """
    store = seen.store if seen is not None and rank == world - 1 else source.store
    model = build("lm")
    try:
        report = ucp.load(model, replace(source, store=store), exchange=False, strict=False)
    except ucp.UcpError as error:
        return f"{type(error).__name__}: {error}", 0, {}
    return "loaded", report.bytes_received, {name: one.detach().numpy() for name, one in model.named_parameters()}


class _Failing(Counting):
    def read_into(self, path: str, offset: int, buffer: bytearray | memoryview) -> None:
        raise ucp.StorageError(f"{path}: the disk of this rank is gone")


class _Unrestored:
    """An object of the user's, which rank 1 cannot restore."""

    def state_dict(self) -> dict[str, int]:
        return {"count": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if distributed.get_rank() == 1:
            raise ValueError(f"no room for {state['count']}")


def one_rank_cannot_restore(rank: int, world: int, url: str) -> str:
    state = {"model": build("lm"), "counting": _Unrestored()}
    ucp.save(state, url)
    try:
        ucp.load(state, url)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def one_rank_fails(rank: int, world: int, source: Checkpoint) -> str:
    ckpt = replace(source, store=_Failing(source.store)) if rank == 1 else source
    try:
        ucp.load(shard(build("lm"), "fsdp", world), ckpt, strict=False)
    except ucp.StorageError as error:
        return str(error)
    return "nothing"
