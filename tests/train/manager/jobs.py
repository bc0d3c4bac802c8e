"""What the ranks and processes of the manager's tests run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ucp
from ucp.lifecycle.shelf import Shelf
from ucp.train.manager import CheckpointManager

WIDTH = 6


def build(seed: int = 0, *, sharded: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(WIDTH, 10), nn.GELU(), nn.Linear(10, WIDTH))
    if sharded:
        model = fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One step on a batch that depends on `step` alone, so that runs that saw the same steps are equal."""
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
    loss = (model(x) - x.flip(1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that training goes on from, whole."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        found |= {f"{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in found.items()
    }


def uninterrupted(steps: int, *, sharded: bool = False) -> dict[str, torch.Tensor]:
    model, optimizer = build(sharded=sharded)
    for step in range(1, steps + 1):
        train_step(model, optimizer, step)
    return fingerprint(model, optimizer)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if not torch.equal(one[name], other[name])]


def run(url: str, steps: int, *, sharded: bool = False, resume: dict[str, Any] | None = None, **options: Any) -> Any:
    """Train up to `steps`, resuming where possible; where it began, how far it came, and what it has then."""
    model, optimizer = build(seed=torch.randint(1000, ()).item(), sharded=sharded)
    if not Path(url).exists() or not CheckpointManager(url).saved:
        model, optimizer = build(sharded=sharded)
    with CheckpointManager(url, **options) as manager:
        resumed = manager.resume((model, optimizer), **(resume or {}))
        step = first = resumed.step if resumed else 0
        while step < steps and not manager.preempted:
            step += 1
            loss = train_step(model, optimizer, step)
            manager.step(step, (model, optimizer), metrics={"loss": loss})
        return first, step, fingerprint(model, optimizer)


def preempted(rank: int, world: int, url: str, told: int, sharded: bool) -> Any:
    """Train until one rank gets SIGTERM in the middle of a step; which step each rank saved, and what the log said."""
    model, optimizer = build(sharded=sharded)
    reached = []
    with CheckpointManager(url, every=1000) as manager:
        assert manager.resume((model, optimizer)) is None
        for step in range(1, 100):
            train_step(model, optimizer, step)
            if rank == told and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.002 * rank)
            reached.append(manager.step(step, (model, optimizer)))
            if manager.preempted:
                break
    handle = reached[-1]
    return step, [each is not None for each in reached], handle.done(), fingerprint(model, optimizer)


def go_on(rank: int, world: int, url: str, steps: int, sharded: bool, options: dict[str, Any]) -> Any:
    return run(url, steps, sharded=sharded, **options)


def outcome(rank: int, world: int, url: str, options: dict[str, Any], misread: int | None = None) -> Any:
    """What resuming comes to on this rank; on rank `misread` alone, the newest checkpoint does not read."""
    model, optimizer = build(seed=9)
    if rank == misread:
        _break_reading()
    with CheckpointManager(url) as manager:
        try:
            resumed = manager.resume((model, optimizer), **options)
        except ucp.UcpError as error:
            return type(error).__name__, str(error), error.hint
        return None if resumed is None else (resumed.step, str(resumed), fingerprint(model, optimizer))


def _break_reading() -> None:
    from ucp.train.manager import manager

    load, calls = manager.load, []

    def broken(target: Any, source: Any, **options: Any) -> Any:
        report = load(target, source, **options)
        calls.append(source)
        if len(calls) == 1:
            raise ucp.CorruptError(f"{source}: read wrongly here", hint="look at the disk")
        return report

    manager.load = broken


def failing_save(rank: int, world: int, url: str, on_error: Any) -> tuple[int, str]:
    """The disk of rank 1 is full when step 4 is saved: the last step reached, and what was raised there."""
    from ucp.store.local import LocalStore

    create = LocalStore.create

    def full(self: LocalStore, path: str, size: int) -> Any:
        if rank == 1 and "step-00000004" in f"{self.root}/{path}":
            raise ucp.StorageError(f"{self.root}/{path}: no room")
        return create(self, path, size)

    LocalStore.create = full  # type: ignore[method-assign]
    model, optimizer = build()
    step = 0
    try:
        with CheckpointManager(url, every=2, on_error=on_error) as manager:
            for step in range(1, 10):
                train_step(model, optimizer, step)
                time.sleep(0.05)
                manager.step(step, (model, optimizer))
    except ucp.StorageError as error:
        return step, str(error)
    return step, ""


class Slow:
    """Makes the deletions of a shelf slow enough to be caught in the middle: it stops for good after a root."""

    def __init__(self, shelf: Shelf) -> None:
        self.delete = shelf.store.delete
        shelf.store.delete = self  # type: ignore[method-assign]

    def __call__(self, path: str) -> None:
        self.delete(path)
        if path.endswith("ucp.json"):
            time.sleep(600)


def main(kind: str, url: str) -> None:
    """The body of a process that is to be killed."""
    logging.basicConfig(level=logging.INFO)
    model, optimizer = build()
    # Only where a deletion is to be caught is there one to catch: at any other kill none is going on.
    manager = CheckpointManager(url, every=1, keep_latest=1 if kind == "retention" else 2)
    if kind == "retention":
        Slow(manager._shelf)
    if kind == "save":
        _stall_writing()
    manager.resume((model, optimizer))
    for step in range(1, 4):
        train_step(model, optimizer, step)
        handle = manager.step(step, (model, optimizer))
        if handle is not None:
            handle.result()
        print("saved", step, flush=True)
    time.sleep(600)


def _stall_writing() -> None:
    """The third save stops for good when its first shard is half written."""
    from ucp.store.local_write import FileWriter

    write, opened = FileWriter.write_at, []

    def stalling(self: FileWriter, offset: int, data: Any) -> None:
        if "step-00000003" in self.full and offset > 0:
            write(self, offset, memoryview(data)[: max(1, len(data) // 2)])
            opened.append(self)
            time.sleep(600)
        write(self, offset, data)

    FileWriter.write_at = stalling  # type: ignore[method-assign]


if __name__ == "__main__":
    main(*sys.argv[1:])
