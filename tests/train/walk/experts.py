"""Experts spread over ranks in the ways that jobs have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from tests.train.walk.layouts import Job, adamw

EXPERTS, WIDTH, INNER = 4, 6, 5
FORMS = ("whole", "dtensor", "named", "declared", "declared fsdp")
DECLARED = {"moe.stacked.*": None}


class Stacked(nn.Module):
    """`count` experts in one tensor each for both of their matrices."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, WIDTH, INNER))
        self.down = nn.Parameter(torch.randn(count, INNER, WIDTH))


class Moe(nn.Module):
    """Every expert sees every token, weighted by the router; a rank adds up its own, and all ranks' sums make one."""

    def __init__(self, first: int, count: int, *, named: bool) -> None:
        super().__init__()
        self.first, self.count = first, count
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleDict({str(first + i): Stacked(1) for i in range(count)}) if named else None
        self.stacked = None if named else Stacked(count)

    def weights(self) -> tuple[Tensor, Tensor]:
        if self.experts is not None:
            held = list(self.experts.values())
            return torch.cat([one.up for one in held]), torch.cat([one.down for one in held])
        assert self.stacked is not None
        up, down = self.stacked.up, self.stacked.down
        return (up.to_local(), down.to_local()) if isinstance(up, DTensor) else (up, down)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.weights()
        gates = self.router(x).softmax(-1)[:, self.first : self.first + self.count]
        hidden = torch.einsum("tw,ewi->tei", x, up).tanh()
        return torch.einsum("te,tei,eiw->tw", gates, hidden, down)


class Model(nn.Module):
    def __init__(self, moe: Moe) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)


def build(form: str, *, seed: int) -> tuple[Job, Any]:
    """The job of this rank, and the layout that it declares."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    ranks = {"whole": 1, "declared fsdp": world // 2}.get(form, world)
    mesh = init_device_mesh("cpu", (ranks, world // ranks), mesh_dim_names=("ep", "dp"))
    count, place = EXPERTS // ranks, mesh.get_local_rank("ep")
    torch.manual_seed(seed + 100 * (form != "whole") * rank)
    model = Model(Moe(place * count, count, named=form == "named"))
    torch.manual_seed(seed)
    with torch.no_grad():
        model.moe.router.weight.normal_()
    layout = None
    if form == "dtensor":
        _as_dtensors(model.moe, mesh["ep"])
    elif form.startswith("declared"):
        layout = {"moe.stacked.*": (mesh["ep"], Shard(0))}
    if form == "declared fsdp":
        fully_shard(model.moe.stacked, mesh=mesh["dp"])
    return Job([model], [adamw(model.parameters())]), layout


def _as_dtensors(moe: Moe, mesh: DeviceMesh) -> None:
    assert moe.stacked is not None
    for name, parameter in list(moe.stacked.named_parameters()):
        sharded = DTensor.from_local(parameter.detach(), mesh, (Shard(0),), run_check=False)
        setattr(moe.stacked, name, nn.Parameter(sharded))


def step(job: Job, number: int) -> None:
    """Gradients that differ by expert, without the traffic of a real job."""
    (model,), (optimizer,) = job.parts, job.optimizers
    for name, parameter in model.named_parameters():
        drawn = torch.Generator().manual_seed(number * 7 + len(name))
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        grad = torch.randn(local.shape, generator=drawn) + local.detach()
        if isinstance(parameter, DTensor):
            grad = DTensor.from_local(grad, parameter.device_mesh, parameter.placements, run_check=False)
        parameter.grad = grad
    optimizer.step()


def truth(job: Job, form: str) -> dict[str, Tensor]:
    """Values and states by name and expert, put together from all ranks by hand."""
    (model,), (optimizer,) = job.parts, job.optimizers
    mine: dict[str, Tensor] = {}
    first, moe = model.moe.first, model.moe  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        for state, value in {"value": parameter, **optimizer.state[parameter]}.items():
            whole = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
            if "router" in name or state == "step":
                mine[f"{state} {name.split('.')[-1]}"] = whole.reshape(-1)
            elif moe.experts is not None:
                mine[f"{state} {name.split('.')[-1]} {name.split('.')[2]}"] = whole[0]
            else:
                start = 0 if form == "dtensor" else first
                mine |= {f"{state} {name.split('.')[-1]} {start + i}": whole[i].clone() for i in range(len(whole))}
    everybody: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everybody, mine)
    return {name: value for one in reversed(everybody) for name, value in one.items()}
