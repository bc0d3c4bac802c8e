"""The script that `bench.elastic` starts under torchrun: one job, kept by ucp or by torch's distributed checkpoints.

    torchrun … -m bench.elastic_jobs REQUEST.json

At the steps that the request names, a rank kills itself, or its whole node, once. Every rank notes what it does and
when, one JSON line each, in `marks` of the root folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

NODES = ("a", "b", "c")
MARKS = "marks"
_HEADS, _LENGTH = 4, 8
_TIMEOUT = 60

Job = tuple[nn.Module, torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Request:
    """`how` is ``dcp``, or the tier that ucp is to recover from: ``memory``, ``local``, ``storage``.

    A transformer of `layers` and `width` makes `steps` on `samples` each. Every `often` steps it goes to memory or
    local disk, every `seldom` to storage. The rank of node b dies in step `rank_dies`, node c in `node_dies`; when
    `node_comes` is done, another node c is started.
    """

    how: str
    root: str
    layers: int
    width: int
    samples: int
    steps: int
    often: int
    seldom: int
    rank_dies: int
    node_dies: int
    node_comes: int

    @property
    def storage(self) -> str:
        """Where checkpoints of every `seldom` steps go."""
        return f"{self.root}/storage"

    @property
    def disks(self) -> str:
        """The local disks of the nodes."""
        return f"{self.root}/disks"


class Marks:
    """What this process did and when (seconds of the wall clock, which all processes of the machine share)."""

    def __init__(self, request: Request) -> None:
        folder = Path(request.root, MARKS)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{os.getpid()}.jsonl").open("a")
        self.put("began", at=_began(), node=os.environ["UCP_NODE"], rank=int(os.environ["RANK"]))

    def put(self, what: str, *, at: float | None = None, **more: Any) -> None:
        """Note that `what` is done now, or was `at`; in the file at once, as the process may die any time."""
        self._file.write(json.dumps({"what": what, "at": time.time() if at is None else at, **more}) + "\n")
        self._file.flush()


def _began() -> float:
    """When this process was started, to 10 ms: /proc/PID/stat, field 22 (proc_pid_stat(5)), in ticks since boot."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    ago = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - ago


class Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Samples made of their number: ``[_LENGTH, width]`` in, the same turned round out."""

    def __init__(self, width: int, count: int = 1 << 20) -> None:
        self.width, self.count = width, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        made = torch.randn(_LENGTH, self.width, generator=torch.Generator().manual_seed(number))
        return made, made.flip(0)


def build(request: Request, mesh: DeviceMesh) -> Job:
    """A transformer sharded by FSDP2, and a plain AdamW."""
    torch.manual_seed(0)
    width = request.width
    layers = [
        nn.TransformerEncoderLayer(width, _HEADS, 4 * width, dropout=0.0, batch_first=True)
        for _ in range(request.layers)
    ]
    model: Any = nn.Sequential(*layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)


def train(job: Job, batches: Iterator[tuple[tuple[Tensor, Tensor], float]]) -> None:
    """One optimizer step on micro-batches, each with the weight of its mean loss."""
    model, optimizer = job
    for (given, wanted), weight in batches:
        loss: Any = nn.functional.mse_loss(model(given), wanted) * weight
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def die(request: Request, step: int, marks: Marks) -> None:
    """Kill this process, or the whole node, if it is time and was not done before."""
    dies = {NODES[1]: request.rank_dies, NODES[2]: request.node_dies}.get(os.environ["UCP_NODE"])
    if step != dies:
        return
    try:
        Path(request.root, f"died-{step}").touch(exist_ok=False)
    except FileExistsError:
        return
    marks.put("died", step=step)
    if step == request.node_dies:
        os.kill(os.getppid(), signal.SIGKILL)  # the node's agent
    os.kill(os.getpid(), signal.SIGKILL)


def await_node(request: Request, step: int, world: int, started: float) -> None:
    """Make steps last half a second while another node is on its way, so that there is a job for it to come to."""
    if step >= request.node_comes and world < len(NODES):
        time.sleep(max(0.0, 0.5 - (time.perf_counter() - started)))


def copy_of(job: Job, marks: Marks) -> Callable[[], None]:
    """A bare copy of this rank's state into memory that is there already; made once the optimizer has state."""
    made: list[Tensor] = []

    def copy() -> None:
        parts = [_local(tensor) for tensor in _tensors(job)]
        if not made:
            made.extend(torch.empty_like(part) for part in parts)
            torch._foreach_copy_(made, parts)
        distributed.barrier()
        started = time.perf_counter()
        torch._foreach_copy_(made, parts)
        marks.put("copied", seconds=time.perf_counter() - started, bytes=sum(part.nbytes for part in parts))
        distributed.barrier()

    return copy


def _tensors(job: Job) -> list[Tensor]:
    model, optimizer = job
    held = [tensor for states in optimizer.state.values() for tensor in states.values() if tensor.ndim]
    return [*model.parameters(), *held]


def _local(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain


def with_ucp(request: Request, marks: Marks) -> None:
    """The loop of docs/elastic.md, with the tiers that are asked for; storage is always one."""
    from ucp.elastic import Batch, Feed, Local, Memory, Run, keep

    marks.put("imported")
    batch = Batch(request.samples, request.samples)
    run = Run(
        request.storage,
        layouts=keep(),
        batch=batch,
        memory=Memory(every=request.often, copies=2) if request.how == "memory" else None,
        local=Local(request.disks, every=request.often, copies=2) if request.how == "local" else None,
        timeout=_TIMEOUT,
        job=os.environ["TORCHELASTIC_RUN_ID"],
        every=request.seldom,
    )
    with run:
        marks.put("joined", world=run.world)
        job = build(request, run.device_mesh("cpu"))
        feed = Feed(Numbers(request.width), batch, seed=1)
        feed.place(*run.seat)
        state = {"model": job[0], "optimizer": job[1], "feed": feed}
        marks.put("loading")
        found = run.resume(state)
        marks.put("loaded", **({"step": found.step, "tier": found.tier} if found else {"step": 0}))
        copy, before, first = copy_of(job, marks), _sent(run), run.done + 1
        for step in run.steps(request.steps):
            started = time.perf_counter()
            die(request, step, marks)
            train(job, feed.step())
            trained = time.perf_counter()
            run.step(step, state)
            marks.put("step", step=step, train=trained - started, save=time.perf_counter() - trained)
            if step == first:
                marks.put("told", parts=dict(run.report.parts))
            await_node(request, step, run.world, started)
            if step % request.seldom == 1:
                copy()
        sent = _sent(run) - before
    marks.put("done", sent=sent)


def _sent(run: Any) -> int:
    """Bytes that this process sent to other nodes."""
    return sum(tier.store.bytes_sent for tier in run.tiers if tier.name != "storage")


def with_dcp(request: Request, marks: Marks) -> None:
    """As torch's own recipe has it: a Stateful around get_state_dict, a folder per step, the newest whole one."""
    import torch.distributed.checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.stateful import Stateful

    dcp: Any = torch.distributed.checkpoint  # it does not say what it exports

    class App(Stateful):
        step = 0

        def state_dict(self) -> dict[str, Any]:
            values, states = get_state_dict(*job)
            return {"model": values, "optim": states, "step": self.step}

        def load_state_dict(self, found: dict[str, Any]) -> None:
            set_state_dict(*job, model_state_dict=found["model"], optim_state_dict=found["optim"])
            self.step = found["step"]

    marks.put("imported")
    distributed.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT))
    marks.put("joined", world=distributed.get_world_size())
    job, app = build(request, init_device_mesh("cpu", (distributed.get_world_size(),))), App()
    marks.put("loading")
    whole = [path.parent for path in Path(request.storage).glob("step-*/.metadata")]
    if whole:
        dcp.load({"app": app}, checkpoint_id=max(whole))
        distributed.barrier()
    marks.put("loaded", step=app.step, tier="storage")
    copy = copy_of(job, marks)
    for step in range(app.step + 1, request.steps + 1):
        started = time.perf_counter()
        die(request, step, marks)
        train(job, _shares(request, step))
        app.step, trained = step, time.perf_counter()
        if step % request.seldom == 0:
            dcp.save({"app": app}, checkpoint_id=f"{request.storage}/step-{step:08}")
        marks.put("step", step=step, train=trained - started, save=time.perf_counter() - trained)
        await_node(request, step, distributed.get_world_size(), started)
        if step % request.seldom == 1:
            copy()
    marks.put("done")


def _shares(request: Request, step: int) -> Iterator[tuple[tuple[Tensor, Tensor], float]]:
    """The samples of a step that are this rank's, as one micro-batch."""
    data, ranks = Numbers(request.width), distributed.get_world_size()
    first = (step - 1) * request.samples + distributed.get_rank() * (request.samples // ranks)
    found = [data[number] for number in range(first, first + request.samples // ranks)]
    yield (torch.stack([given for given, _ in found]), torch.stack([wanted for _, wanted in found])), 1.0


def main() -> None:
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    marks = Marks(request)
    if request.how == "dcp":
        with_dcp(request, marks)
        distributed.destroy_process_group()
    else:
        with_ucp(request, marks)


if __name__ == "__main__":
    main()
