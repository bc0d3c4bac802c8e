"""Jobs with everything beside tensors: dropout, a schedule, a loss scale, data, counters, and what each rank saw."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

import ucp
from ucp.train.items import PerRank, ReshardableLoader, ReshardableSampler, Rng
from ucp.train.save import save

SAMPLES = 50


class Vectors(Dataset[tuple[int, Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.full((6,), index / SAMPLES).sin()


class Seen:
    """Samples that this rank was given."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = list(state["samples"])


def merge(states: Any) -> dict[str, Any]:
    return {"samples": sorted(sample for state in states for sample in state["samples"])}


def split(state: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    return {"samples": state["samples"][rank::size]}


class Job:
    """One rank of it."""

    def __init__(self, rank: int, world: int, *, batch: int, workers: int = 0) -> None:
        # Ranks of the tests are daemons, which may not start workers; those end with the rank that started them.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 6))
        fully_shard(self.model)
        torch.manual_seed(100 + rank)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        sampler = ReshardableSampler(Vectors(), seed=3)
        self.loader = ReshardableLoader(DataLoader(Vectors(), batch_size=batch, sampler=sampler, num_workers=workers))
        self.seen = Seen()
        self.counts = {"steps": 0, "best": None}

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "lr_scheduler": self.scheduler,
            "scaler": self.scaler,
            "rng": Rng(),
            "loader": self.loader,
            "seen": PerRank(self.seen, merge=merge, split=split),
            "counts": self.counts,
        }

    def run(self, steps: int) -> list[float]:
        """Train; returns the losses of this rank."""
        losses: list[float] = []
        while steps > len(losses):
            for samples, x in self.loader:
                losses.append(self._step(samples, x))
                if len(losses) == steps:
                    break
        return losses

    def _step(self, samples: Tensor, x: Tensor) -> float:
        self.seen.samples += samples.tolist()
        loss = (self.model(x) - x).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.counts["steps"] += 1
        self.counts["best"] = 0.5
        return float(loss.detach())

    def told(self) -> dict[str, Any]:
        """What a test compares."""
        return {
            "lr": self.scheduler.get_last_lr(),
            "scaler": self.scaler.state_dict(),
            "counts": dict(self.counts),
            "position": self.loader.sampler.position,
        }


def start(rank: int, world: int, url: str, steps: int, more: int) -> dict[str, Any]:
    job = Job(rank, world, batch=4)
    job.run(steps)
    save(job.state, url, step=steps)
    told = {"seen": list(job.seen.samples), **job.told()}
    return {**told, "losses": job.run(more)}


def go_on(rank: int, world: int, url: str, steps: int, batch: int, workers: int) -> dict[str, Any]:
    job = Job(rank, world, batch=batch, workers=workers)
    torch.rand(17)
    report = ucp.load(job.state, url)
    told = {"start": list(job.seen.samples), "notes": report.notes, "left": report.not_loaded, **job.told()}
    losses = job.run(steps)
    return {**told, "losses": losses, "seen": list(job.seen.samples)}


def differ(rank: int, world: int, url: str) -> str:
    job = Job(rank, world, batch=4)
    job.counts["steps"] = rank
    try:
        save(job.state, url)
    except ucp.ConflictError as error:
        return str(error)
    return ""
