"""Real Megatron-Core training jobs on CPU: what a test asks for, and what it gets back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.deepspeed_job import run_module
from tests.support.megatron import Coordinate, Grid, Held, Model

BATCH, LENGTH = 8, 16
"""Sequences of a step over all ranks, and tokens of each."""


@dataclass(frozen=True)
class Job:
    """One run: build, load, train `first` steps, record, save, train `then` more."""

    model: Model
    grid: Grid
    out: str
    """Folder of what is recorded."""

    load: str | None = None
    form: str = "torch_dist"
    save: str | None = None
    """Folder for a torch_dist checkpoint; ``<save>_legacy`` becomes one in the legacy form."""

    first: int = 0
    then: int = 0
    at: int = 0
    bf16: bool = True
    distributed: bool = True
    optimizer: bool = True
    """Whether the optimizer's state is loaded, or taken anew from the model."""

    logits: bool = False
    """Whether logits are computed, of what was loaded."""

    scheduler: str = "checkpoint"
    """``checkpoint``: the saved one is taken; ``none``: not loaded."""


@dataclass(frozen=True)
class Ran:
    """What the ranks of a job held when they recorded, and the losses of the steps after that."""

    job: Job
    shards: Mapping[Coordinate, Mapping[str, Any]]
    """By coordinate: torch tensors as ``value/<name>``, ``param/<name>``, ``exp_avg/<name>``, ``exp_avg_sq/<name>``."""

    groups: list[dict[str, Any]]
    losses: list[float]
    random: Mapping[Coordinate, str]
    """What tells random states apart, by rank."""

    logits: np.ndarray | None = None

    def arrays(self, state: str) -> Held:
        """One state as numpy arrays; those that numpy has no dtype for as integers."""
        start = f"{state}/"
        return Held(
            self.job.grid,
            {
                at: {key.removeprefix(start): _numpy(value) for key, value in held.items() if key.startswith(start)}
                for at, held in self.shards.items()
            },
            np.empty(0),
        )


def _numpy(tensor: Any) -> np.ndarray:
    array: np.ndarray = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def batch(model: Model, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels [BATCH, LENGTH] of one step."""
    drawn = np.random.default_rng(1000 + number).integers(0, model.vocab, (BATCH, LENGTH + 1))
    return drawn[:, :-1], drawn[:, 1:]


def run_jobs(jobs: Sequence[Job], *, timeout: float = 600) -> list[Ran]:
    """Run `jobs` one after another in one fresh process; skips where Megatron-Core is not installed."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; these tests load checkpoints in it (pip install megatron-core)")
    run_module(
        "tests.converters.megatron.write_job", json.dumps([dataclasses.asdict(job) for job in jobs]), timeout=timeout
    )
    return [read_job(job) for job in jobs]


def as_job(listed: dict[str, Any]) -> Job:
    """A job from JSON."""
    layers = listed["model"]["expert_layers"]
    model = Model(**{**listed["model"], "expert_layers": None if layers is None else tuple(layers)})
    return Job(**{**listed, "model": model, "grid": Grid(**listed["grid"])})


def read_job(job: Job) -> Ran:
    """What the ranks of a job left."""
    out = Path(job.out)
    listing: list[dict[str, Any]] = json.loads((out / "ranks.json").read_text())
    shards = {tuple(sorted(entry["at"].items())): load_file(out / entry["file"]) for entry in listing}
    each = [json.loads(path.read_text()) for path in sorted(out.glob("losses*.json"))]
    losses = [float(np.mean(step)) for step in zip(*each, strict=True)]
    logits = np.load(out / "logits.npy") if job.logits else None
    random = {tuple(sorted(entry["at"].items())): entry["random"] for entry in listing}
    return Ran(job, shards, json.loads((out / "groups.json").read_text()), losses, random, logits)
