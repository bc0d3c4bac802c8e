"""What ranks do in the tests of the native form: train a little, save, and keep the truth."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import ucp
from ucp.errors import UcpError
from ucp.train.save import save


class Model(nn.Module):
    """Dims that no rank count divides, one smaller than any, a tied weight, a frozen one, a scalar, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 11)
        self.norm = nn.BatchNorm1d(11)
        self.down = nn.Linear(11, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.fixed = nn.Parameter(torch.randn(5, 3), requires_grad=False)

    def forward(self, x):
        return self.down(self.norm(self.up(self.embed(x)))) * self.scale


def build(seed=1):
    torch.manual_seed(seed)
    return Model()


def adam(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "lr": 0.01}, {"params": others, "lr": 0.003, "betas": (0.8, 0.9)}])


def train(model, optimizer, rank, steps=2):
    for step in range(steps):
        torch.manual_seed(100 * step + rank)
        model(torch.randint(0, 13, (6,))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(world, axes=("dp",), shape=None, seed=1):
    mesh = init_device_mesh("cpu", shape or (world,), mesh_dim_names=axes)
    model = build(seed)
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, adam(model)


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def truth(model, optimizer):
    """Every state of every tensor as torch gathers it, under ``name[state]``."""
    found = {f"{name}[value]": full(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    for name, parameter in model.named_parameters():
        for state, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}[{state}]"] = full(value)
    return found


def save_fsdp(rank, world, folder, axes=("dp",), shape=None):
    model, optimizer = sharded(world, axes, shape)
    train(model, optimizer, rank)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    save({"model": model, "optimizer": optimizer, "lr_scheduler": schedule}, f"{folder}/ckpt", step=2)
    found = truth(model, optimizer)
    if rank == 0:
        torch.save(found, f"{folder}/truth.pt")


def load_fsdp(rank, world, folder):
    """Into another layout with other values; what does not equal the truth."""
    model, optimizer = sharded(world, seed=2)
    report = ucp.load((model, optimizer), f"{folder}/ckpt")
    expected = torch.load(f"{folder}/truth.pt")
    found = truth(model, optimizer)
    assert found.keys() == expected.keys()
    assert report.step == 2
    groups = [(group["lr"], group["betas"]) for group in optimizer.param_groups]
    return [key for key in expected if not torch.equal(found[key], expected[key])], groups


def save_ddp(rank, world, folder):
    """Under DDP the ranks' running statistics differ after a step: rank 0's are saved."""
    model = build()
    optimizer = adam(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    train(wrapped, optimizer, rank)
    save((wrapped, optimizer), f"{folder}/ckpt")
    found = truth(model, optimizer)
    if rank == 0:
        torch.save(found, f"{folder}/truth.pt")


def outcome(work):
    """What `work` raised, as (class, message); None if nothing."""
    try:
        work()
    except UcpError as error:
        return type(error).__name__, str(error)
    return None


def save_drifted(rank, world, folder):
    return outcome(lambda: save({"w": torch.full((3,), float(rank == 1))}, f"{folder}/ckpt"))


def save_twice(rank, world, folder):
    save({"w": torch.ones(3)}, f"{folder}/ckpt")
    return outcome(lambda: save({"w": torch.zeros(3)}, f"{folder}/ckpt"))


def save_to_nowhere(rank, world, folder):
    """One rank cannot write: its folder is a file."""
    Path(folder, "ckpt").mkdir(exist_ok=True)
    Path(folder, "ckpt", "shards").touch()
    return outcome(lambda: save({"w": torch.ones(3)}, f"{folder}/ckpt"))


def save_holed(rank, world, folder):
    """A tensor whose shards the ranks do not all hand over."""
    mesh = init_device_mesh("cpu", (world,))
    tensor = distribute_tensor(torch.arange(10.0), mesh, [Shard(0)])
    return outcome(lambda: save({"w": tensor, "x": torch.ones(1)} if rank else {"x": torch.ones(1)}, f"{folder}/ckpt"))


def save_and_die(rank, world, folder):
    """A rank of its own, that no parent watches: rank 1 is killed before it writes, the others note what they raise."""
    from ucp.train.save import native as module

    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    write = module._write_file

    def killed(*args):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    module._write_file = killed
    tensors = {f"w{i}": torch.ones(1000) for i in range(6)}
    Path(folder, f"raised-{rank}").write_text(str(outcome(lambda: save(tensors, f"{folder}/ckpt"))))
    os._exit(0)


def save_replicated(rank, world, folder):
    """Every rank holds every byte, a part of it as a DTensor."""
    mesh = init_device_mesh("cpu", (world,))
    tensors = {f"w{i}": torch.arange(1000.0) + i for i in range(6)}
    tensors["d"] = distribute_tensor(torch.arange(7.0), mesh, [Replicate()])
    tensors |= {"h": torch.arange(5).to(torch.bfloat16), "b": torch.tensor([True, False]), "n": torch.tensor(3)}
    tensors["empty"] = torch.empty(0, 4)
    save(tensors, f"{folder}/ckpt")


def save_disagreeing(rank, world, folder):
    return outcome(lambda: save({"w": torch.ones(3 + rank)}, f"{folder}/ckpt"))


def save_strange_state(rank, world, folder):
    """Only one rank fails."""
    module = nn.ParameterDict({"w": nn.Parameter(torch.ones(3))})
    optimizer = torch.optim.SGD(module.parameters())
    optimizer.state[module["w"]] = {"odd": [1, 2]} if rank else {}
    return outcome(lambda: save((module, optimizer), f"{folder}/ckpt"))
