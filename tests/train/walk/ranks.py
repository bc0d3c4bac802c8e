"""What the ranks of these tests run."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Partial, Shard

import ucp
from tests.train.walk import experts
from tests.train.walk.layouts import CPU, OPTIMIZERS, Job, adamw, build, differences, truth
from tests.train.walk.net import Net, batch
from ucp.train.save import save

STEPS = 2
Found = dict[str, tuple[list[str], float]]
"""Of each way from layout to layout: names of what differs after it, and how far the next losses are apart."""


def several(rank: int, world: int, folder: str, work: Sequence[tuple[str, str, Sequence[Any]]]) -> dict[str, Any]:
    """One job after the other: what each function of this module found, by a name for each."""
    return {name: globals()[function](rank, world, f"{folder}/{name}", *given) for name, function, given in work}


def matrix(
    rank: int, world: int, folder: str, ways: Sequence[tuple[str, str]], optimizer: str, options: dict[str, Any]
) -> Found:
    """Save each source after some steps; load it in each target, compare everything, and go on."""
    make, known = OPTIMIZERS[optimizer], {}
    for source in dict.fromkeys(source for source, _ in ways):
        job = build(source, make, seed=3, **options)
        for number in range(STEPS):
            job.step(number)
        save(job.state, f"{folder}/{source}", step=STEPS)
        known[source] = truth(job), _losses(job)
    found: Found = {}
    for source, target in ways:
        job = build(target, make, seed=8, **options)
        report = ucp.load(job.state, f"{folder}/{source}")
        state, losses = known[source]
        assert report.step == STEPS
        differing = differences(state, truth(job))
        gaps = [abs(a - b) for a, b in zip(losses, _losses(job), strict=True)]
        found[f"{source} -> {target}"] = (differing, max(gaps))
    return found


def _losses(job: Job) -> list[float]:
    """The next losses, as the rank knows them that has the end of a pipeline."""
    mine = [job.step(number) for number in range(STEPS, STEPS + 2)]
    everybody: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everybody, mine)
    return next(losses for losses in everybody if not any(map(math.isnan, losses)))


class App(Stateful):
    """What torch's own recipe makes of a model and its optimizer."""

    def __init__(self, job: Job, *, flat: bool) -> None:
        self.model, self.optimizer = job.parts[0], job.optimizers[0]
        self.options = StateDictOptions(flatten_optimizer_state_dict=flat)
        self.epoch = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
        return {"model": model, "optim": optimizer, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch = state_dict["epoch"]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optim"],
            options=self.options,
        )


def apps(rank: int, world: int, folder: str, ways: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Save state dicts in one layout, load them in another, nested ones into flattened ones and back."""
    found: dict[str, Any] = {}
    for source, target in ways:
        for flat in (False, True):
            url = f"{folder}/{source} {target} {flat}"
            job = build(source, adamw, seed=3)
            for number in range(STEPS):
                job.step(number)
            app = App(job, flat=flat)
            app.epoch = 7
            save({"app": app}, url, step=STEPS)
            known = truth(job)
            job = build(target, adamw, seed=8)
            job.optimizers[0].param_groups[0]["lr"] = 9.0
            app = App(job, flat=not flat)
            ucp.load({"app": app}, url)
            plain = build("plain", adamw, seed=9)
            ucp.load(plain.state, url)
            rates = [one.optimizers[0].param_groups[0]["lr"] for one in (job, plain)]
            wrong = differences(known, truth(job)) + differences(known, truth(plain))
            found[f"{source} -> {target} {flat}"] = (wrong, rates, app.epoch)
    return found


def statistics(rank: int, world: int, folder: str) -> list[float]:
    """Statistics of batches differ by rank under data parallelism, in state dicts as in modules: rank 0's count."""
    state = nn.BatchNorm1d(3).state_dict()
    state["running_mean"] += rank + 1
    save({"model": state}, folder)
    state["running_mean"].zero_()
    ucp.load({"model": state}, folder)
    found: list[float] = state["running_mean"].tolist()
    return found


def gathered(rank: int, world: int, folder: str, layout: str) -> tuple[list[str], float, float]:
    """A load after a forward pass, which has gathered parameters: training goes on with what was loaded."""
    job = build(layout, adamw, seed=3)
    job.step(0)
    save(job.state, f"{folder}/saved")
    wanted, known = job.step(1), truth(job)
    job = build(layout, adamw, seed=8)
    job.step(0)
    job.parts[0](batch(5)[0])
    ucp.load(job.state, f"{folder}/saved")
    loss = job.step(1)
    return differences(known, truth(job)), wanted, loss


def refused(rank: int, world: int, folder: str) -> list[str]:
    """What is said of FSDP1 modules that cannot be taken."""
    keywords: dict[str, Any] = {"device_id": CPU, "use_orig_params": True}
    turned = nn.Linear(6, 5)
    turned.weight = nn.Parameter(torch.randn(6, 5).t())
    module = FullyShardedDataParallel(nn.Sequential(turned, nn.Linear(5, 3)), **keywords)
    said = [_error(lambda: save(module, f"{folder}/turned"))]
    module = FullyShardedDataParallel(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), **keywords)
    with FullyShardedDataParallel.summon_full_params(module):
        said.append(_error(lambda: save(module, f"{folder}/gathered")))
    for original in (True, False):
        wrapped = FullyShardedDataParallel(nn.Linear(6, 5), device_id=CPU, use_orig_params=original)
        said.append(_error(partial(save, wrapped.module, f"{folder}/inside")))
    return [*said, _error(partial(_part_of_flat, f"{folder}/steps"))]


def _part_of_flat(url: str) -> None:
    """Load one of two tensors in a flat parameter, from a job that made more steps."""
    for steps in (2, 1):
        torch.manual_seed(steps)
        module = FullyShardedDataParallel(nn.Linear(6, 5), device_id=CPU, use_orig_params=False)
        optimizer = torch.optim.AdamW(module.parameters())
        for _ in range(steps):
            module(torch.ones(1, 6)).sum().backward()
            optimizer.step()
        if steps == 2:
            save((module, optimizer), url)
    ucp.load((module, optimizer), url, only="weight")


def _error(work: Any) -> str:
    try:
        work()
    except ucp.UcpError as error:
        return f"{type(error).__name__}: {error} ({error.hint})"
    return "nothing"


@contextlib.contextmanager
def saved(folder: str) -> Iterator[str]:
    """A plain model, saved by all ranks."""
    job = build("plain", adamw, seed=3)
    job.step(0)
    save(job.state, f"{folder}/plain", step=1)
    yield f"{folder}/plain"


def stages(rank: int, world: int, folder: str) -> dict[str, Any]:
    """A schedule and a stage as targets; names that no stage has, on either side; names of a stage's own."""
    found: dict[str, Any] = {}
    with saved(folder) as url:
        for kind in ("pp", "pp interleaved"):
            job = build(kind, adamw, seed=8)
            found[kind] = ucp.load(job.schedule, url, only=["layers.*"]).tensors
            save(job.schedule, f"{folder}/{kind}")
        found["names"] = sorted(ucp.open(f"{folder}/pp interleaved").names) == sorted(Net().state_dict())
        part = build("pp", adamw, seed=8).parts[0]
        if rank == 1:
            del part.layers["3"]  # type: ignore[union-attr]
        found["unexpected"] = _error(lambda: ucp.load(part, url, only=["layers.*"]))
        part = build("pp", adamw, seed=8).parts[0]
        if rank == 1:
            part.extra = nn.Linear(2, 2)
        found["missing"] = _error(lambda: ucp.load(part, url))
        found["map"] = ucp.load({"first" if rank == 0 else "last": torch.zeros(6)}, url, **_renamed()).tensors
        found["no such name"] = _error(lambda: ucp.load({"first": torch.zeros(6)}, url, **_renamed()))
    job = build("pp interleaved", adamw, seed=8)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 5) for optimizer in job.optimizers]
    job.step(0)
    for scheduler in schedulers:
        scheduler.step()
    state = {"model": job.parts, "optimizer": job.optimizers, "lr_scheduler": schedulers}
    save(state, f"{folder}/scheduled")
    schedulers[1].step()
    ucp.load(state, f"{folder}/scheduled")
    found["schedulers"] = [scheduler.last_epoch for scheduler in schedulers]
    torch.manual_seed(rank)
    own = nn.Sequential(nn.Linear(3, 3))
    found["own names"] = _error(lambda: save(own, f"{folder}/own"))
    return found


def _renamed() -> dict[str, Any]:
    names = {"first": "layers.0.norm.weight", "last": "layers.3.norm.weight"}
    return {"map": names, "only": list(names), "strict": False}


def moe(rank: int, world: int, folder: str, ways: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Experts saved in one form and loaded in another."""
    known, found = {}, dict[str, Any]()
    for source in dict.fromkeys(source for source, _ in ways):
        job, layout = experts.build(source, seed=3)
        for number in range(STEPS):
            experts.step(job, number)
        if layout is not None:
            found[f"{source} undeclared"] = _error(lambda state=job.state: save(state, f"{folder}/no", step=0))
        save(job.state, f"{folder}/{source}", step=STEPS, layout=layout)
        known[source] = experts.truth(job, source)
    for source, target in ways:
        job, layout = experts.build(target, seed=9)
        ucp.load(job.state, f"{folder}/{source}", layout=layout)
        found[f"{source} -> {target}"] = differences(known[source], experts.truth(job, target))
        experts.step(job, STEPS)
    return found


def misdeclared(rank: int, world: int, folder: str) -> list[str]:
    """Layouts that say nothing, or too much."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    state = {"w": torch.ones(2, 3)}
    wrong = ([Shard(0), Shard(1)], [Partial()], [Shard(2)])
    return [_error(lambda given=given: save(state, f"{folder}/no", layout={"w": (mesh, given)})) for given in wrong]


def record(rank: int, world: int, folder: str) -> dict[str, Any]:
    """The manifests of jobs in several layouts."""
    found = {}
    for layout in ("ddp", "tp fsdp", "fsdp1 hybrid", "pp fsdp"):
        job = build(layout, adamw, seed=3)
        save(job.parts[0], f"{folder}/{layout}")
        found[layout] = json.loads(Path(folder, layout, "ucp.json").read_text())
    return found
