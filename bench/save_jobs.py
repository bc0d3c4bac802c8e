"""What the ranks of `bench.save` do."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import distributed, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ucp.train.save import async_save, save

# Neither says what it exports or how it is typed.
dcp: Any = torch.distributed.checkpoint

_PIECE = 256 << 10
_STEPS = 40

Round = dict[str, float]
"""Seconds by name, and the rank's bytes."""


@dataclass(frozen=True, slots=True)
class Request:
    """`layers` of `width`; checkpoints go below `root`."""

    root: str
    layers: int
    width: int
    rounds: int


class Block(nn.Module):
    """The parameters of a transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)


def on_gpu(rank: int, world: int, request: Request) -> None:
    """A rank with a GPU of its own."""
    torch.cuda.set_device(rank)
    meet = f"file://{request.root}/meet"
    distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=meet, rank=rank, world_size=world)
    Path(request.root, f"{rank}.json").write_text(json.dumps(run(rank, world, request)))
    distributed.destroy_process_group()


def run(rank: int, world: int, request: Request) -> list[Round]:
    """All rounds; the first one is the one in which memory is new."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    job = Job(rank, world, request, device)
    found = []
    for number in range(request.rounds + 1):
        # Rotated, so that nobody is always the one that comes after the same other one.
        work = [job.copy, job.ucp_async, job.dcp_async, job.dcp_cached, job.disk, job.ucp_save, job.dcp_save]
        one: Round = {"bytes": float(job.nbytes), **job.quiet()}
        for part in work[number % len(work) :] + work[: number % len(work)]:
            one |= part(f"{request.root}/{number}")
        found.append(one)
    return found


class Job:
    """A sharded model with its optimizer, and what is measured of it."""

    def __init__(self, rank: int, world: int, request: Request, device: str) -> None:
        self.rank, self.device = rank, device
        mesh = init_device_mesh(device, (world,))
        with torch.device("meta"):
            model: Any = nn.Sequential(*(Block(request.width) for _ in range(request.layers)))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device=device)
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), foreach=False)
        get_state_dict(self.model, self.optimizer)  # makes the moments
        self.locals = [_local(tensor) for tensor in self._tensors()]
        for tensor in self.locals:
            tensor.uniform_()
        pinned = device == "cuda"
        self.copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in self.locals]
        self.nbytes = sum(t.nbytes for t in self.locals)
        self.side = distributed.new_group(backend="gloo")
        shared = StagingOptions(
            use_pinned_memory=pinned, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=pinned
        )
        self.stager = DefaultStager(shared)
        torch.set_num_threads(1)
        self.small = nn.Sequential(*(nn.Linear(192, 192) for _ in range(8)))

    def copy(self, _: str) -> Round:
        """A bare copy to host memory that is there already."""
        return self._stalled("copy", self._copy)

    def ucp_async(self, folder: str) -> Round:
        """`ucp.async_save`, and steps while it writes."""
        made: list[Any] = []

        def start() -> None:
            made.append(async_save((self.model, self.optimizer), f"{folder}/ucp-async"))

        stall = self._stalled("ucp stall", start)
        return stall | self._meanwhile("ucp", folder, stall["ucp stall"], made[0].done, made[0].result)

    def dcp_async(self, folder: str) -> Round:
        """`dcp.async_save` as it is by default."""
        made: list[Any] = []

        def start() -> None:
            made.append(dcp.async_save(self._dict(), checkpoint_id=f"{folder}/dcp-async", process_group=self.side))

        stall = self._stalled("dcp stall", start)
        return stall | self._meanwhile("dcp", folder, stall["dcp stall"], made[0].done, made[0].result)

    def dcp_cached(self, folder: str) -> Round:
        """The same with a stager that keeps its memory."""
        made: list[Any] = []

        def start() -> None:
            found = dcp.async_save(
                self._dict(),
                checkpoint_id=f"{folder}/dcp-cached",
                process_group=self.side,
                async_stager=self.stager,
            )
            if hasattr(found, "staging_completion"):
                found.staging_completion.result()
            made.append(getattr(found, "upload_completion", found))

        stall = self._stalled("dcp cached stall", start)
        made[0].result()
        self._remove(folder)
        return stall

    def disk(self, folder: str) -> Round:
        """The same bytes by plain write calls and one fsync a rank."""
        return {"disk": self._durably(folder, lambda: self._write(f"{folder}/{self.rank}.bin"))}

    def ucp_save(self, folder: str) -> Round:
        """`ucp.save`."""
        return {"ucp save": self._durably(folder, lambda: save((self.model, self.optimizer), f"{folder}/ucp"))}

    def dcp_save(self, folder: str) -> Round:
        """`dcp.save`, which syncs its files, too."""
        return {"dcp save": self._durably(folder, lambda: dcp.save(self._dict(), checkpoint_id=f"{folder}/dcp"))}

    def quiet(self) -> Round:
        """A step of training while nothing is saved."""
        self._step()
        distributed.barrier()
        started = time.perf_counter()
        for _ in range(_STEPS):
            self._step()
        return {"quiet step": (time.perf_counter() - started) / _STEPS}

    def _meanwhile(
        self, name: str, folder: str, stall: float, done: Callable[[], bool], result: Callable[[], Any]
    ) -> Round:
        started, steps = time.perf_counter(), 0
        while steps < 3 or not done():
            self._step()
            steps += 1
        step = (time.perf_counter() - started) / steps
        result()
        whole = stall + time.perf_counter() - started
        self._remove(folder)
        return {f"{name} step": step, f"{name} in background": whole}

    def _step(self) -> None:
        """Small multiplications and much of Python: what suffers most from others who hold the interpreter."""
        self.small(torch.ones(64, 192)).sum().backward()
        for parameter in self.small.parameters():
            parameter.grad = None
        sum(number * number for number in range(3000))

    def _stalled(self, name: str, work: Callable[[], Any]) -> Round:
        """Seconds that the caller waits, and those of them that its thread computes: others' work does not count."""
        cpu: list[float] = []

        def counted() -> None:
            started = time.thread_time()
            work()
            cpu.append(time.thread_time() - started)

        return {name: self._timed(counted), f"{name} CPU": cpu[0]}

    def _timed(self, work: Callable[[], Any]) -> float:
        if self.rank == 0:
            os.sync()
        if self.device == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def _durably(self, folder: str, work: Callable[[], Any]) -> float:
        Path(folder).mkdir(parents=True, exist_ok=True)
        seconds = self._timed(work)
        self._remove(folder)
        return seconds

    def _remove(self, folder: str) -> None:
        distributed.barrier()
        if self.rank == 0:
            shutil.rmtree(folder)
        distributed.barrier()

    def _copy(self) -> None:
        torch._foreach_copy_(self.copies, self.locals, non_blocking=self.device == "cuda")
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _write(self, path: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            for tensor in self.copies:
                data = tensor.view(-1).view(torch.uint8).numpy().data
                for start in range(0, len(data), _PIECE):
                    os.write(fd, data[start : start + _PIECE])
            os.fsync(fd)
        finally:
            os.close(fd)

    def _dict(self) -> dict[str, Any]:
        values, states = get_state_dict(self.model, self.optimizer)
        return {"model": values, "optim": states}

    def _tensors(self) -> list[torch.Tensor]:
        held = [tensor for states in self.optimizer.state.values() for tensor in states.values() if tensor.ndim]
        return [*self.model.parameters(), *held]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain
