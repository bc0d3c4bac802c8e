"""Checkpoints of real Megatron-Core training: what a test asks for, and what it gets back.

A `Trained` is a job that has made a few steps with Megatron-Core's own optimizers and saved itself in each of the
formats asked for. Its truth are the states that the live optimizers hold, as every rank has them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.deepspeed_job import run_module
from tests.support.megatron import Coordinate, Grid, Model

Format = Literal["fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter", "plain", "legacy"]
"""`plain` is torch_dist without a distributed optimizer; the first three are torch_dist with one."""

STATES = ("value", "exp_avg", "exp_avg_sq")
ITERATION = 3


@dataclass(frozen=True)
class Job:
    """A model on a grid, trained in `dtype`; `distributed` says whether with Megatron's distributed optimizer."""

    model: Model
    grid: Grid
    formats: tuple[Format, ...]
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    distributed: bool = True
    bucket: int | None = None
    """Elements after which a bucket of gradients is closed; None for one bucket."""
    per_layer: bool = False
    """Keys that name the layer, as a non-homogeneous save has them."""

    @property
    def name(self) -> str:
        kind = "distributed" if self.distributed else "plain"
        more = f"_bucket{self.bucket}" if self.bucket else ""
        return f"{self.model.name}_{self.grid.name}_{self.dtype}_{kind}{more}{'_layers' * self.per_layer}"


@dataclass(frozen=True)
class Trained:
    """A trained job: `truth` has each state of each parameter by rank coordinate, `model` the weights as trained."""

    job: Job
    folder: Path
    truth: Mapping[str, Mapping[Coordinate, Mapping[str, np.ndarray]]]

    def checkpoint(self, form: Format) -> Path:
        """The root of the checkpoint in one format."""
        return self.folder / form


def train(jobs: Sequence[Job], folder: Path) -> dict[str, Trained]:
    """Run the jobs in one fresh process; skips where Megatron-Core is not installed."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; these tests read what it saves (pip install megatron-core)")
    request = {"folder": str(folder), "jobs": [dataclasses.asdict(job) for job in jobs]}
    run_module("tests.support.megatron_trained_job", json.dumps(request), timeout=900)
    return {job.name: read_trained(job, folder / job.name) for job in jobs}


def read_trained(job: Job, folder: Path) -> Trained:
    """What a job left in its folder."""
    listing: list[dict[str, Any]] = json.loads((folder / "ranks.json").read_text())
    truth: dict[str, dict[Coordinate, dict[str, np.ndarray]]] = {state: {} for state in STATES}
    for entry in listing:
        arrays = load_file(folder / entry["file"])
        for state in STATES:
            held = {name.removeprefix(f"{state}/"): a for name, a in arrays.items() if name.startswith(f"{state}/")}
            truth[state][tuple(sorted(entry["at"].items()))] = held
    return Trained(job, folder, truth)
