"""Real Megatron-Core models on CPU: what a test asks for, and what it gets back.

A `Family` of checkpoints is one model with fixed weights as several grids of ranks hold it. The weights are drawn on
one rank and saved; every other grid loads them with Megatron-Core's own resharding, so what its ranks hold is the
framework's word and nobody else's. Each grid also runs its own forward pass.
"""

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
from safetensors.numpy import load_file

from tests.support.deepspeed_job import run_module

Coordinate = tuple[tuple[str, int], ...]
"""The index on each mesh axis, by axis name."""


@dataclass(frozen=True)
class Model:
    """A tiny GPT; the defaults make it a Llama."""

    name: str
    layers: int = 4
    hidden: int = 48
    heads: int = 4
    groups: int = 2
    ffn: int = 76
    vocab: int = 103
    positions: int = 32
    norm: str = "RMSNorm"
    gated: bool = True
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    learned_positions: bool = False
    experts: int | None = None
    topk: int = 2
    ffn_moe: int = 36
    ffn_shared: int | None = None
    routed_with_bias: bool = False
    """Scores by sigmoid with a bias per expert, and a gate before the shared experts."""
    grouped: bool = False
    """Experts of a rank are one parameter (GroupedMLP); nothing is computed with it, for want of its kernels."""
    expert_layers: tuple[int, ...] | None = None
    """1 for each layer with experts, 0 for each without; None: all of them."""

    divisible: int = 8


@dataclass(frozen=True)
class Grid:
    """How many ranks along each axis, and of what size the data-parallel axis is."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    first_stage: int | None = None
    """Layers of the first stage, where it is to have another number than the rest."""

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        listed = self._listed().items()
        return "_".join(f"{axis}{n}" for axis, n in listed if n > 1 or axis == "first_stage") or "one"

    @property
    def mesh(self) -> dict[str, int]:
        """Axis sizes as the programs name them. Experts divide the same ranks another way."""
        sizes = {axis: size for axis, size in self._listed().items() if axis != "first_stage"}
        return {**sizes, "edp": self.tp * self.dp // (self.ep * self.etp)}

    def _listed(self) -> dict[str, int]:
        return {axis: size for axis, size in dataclasses.asdict(self).items() if size is not None}


ONE = Grid()


@dataclass(frozen=True)
class Held:
    """What the ranks of one grid hold, and the logits of its own forward pass."""

    grid: Grid
    shards: Mapping[Coordinate, Mapping[str, np.ndarray]]
    """By coordinate: a rank of an interleaved pipeline has one for each of its model chunks."""
    logits: np.ndarray


@dataclass(frozen=True)
class Family:
    """One model as several grids hold it, and the folder of the torch_dist checkpoint they all come from."""

    model: Model
    grids: Mapping[Grid, Held]
    checkpoint: Path


def tokens(model: Model) -> np.ndarray:
    """The batch that every forward pass sees: [2, 16] token numbers."""
    return np.random.default_rng(11).integers(0, model.vocab, (2, 16))


def make_families(wanted: Mapping[Model, Sequence[Grid]], folder: Path) -> dict[str, Family]:
    """Run Megatron-Core in one fresh process for all models and grids; skips where it is not installed."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; these tests compare with its modules (pip install megatron-core)")
    grids = {model: [ONE, *(grid for grid in listed if grid != ONE)] for model, listed in wanted.items()}
    jobs = [
        {"model": dataclasses.asdict(model), "grids": [dataclasses.asdict(grid) for grid in listed]}
        for model, listed in grids.items()
    ]
    run_module("tests.support.megatron_job", json.dumps({"folder": str(folder), "jobs": jobs}), timeout=600)
    return {model.name: _read(model, listed, folder / model.name) for model, listed in grids.items()}


def _read(model: Model, grids: Sequence[Grid], folder: Path) -> Family:
    held = {grid: _read_grid(grid, folder / grid.name) for grid in grids}
    return Family(model, held, folder / "checkpoint")


def _read_grid(grid: Grid, folder: Path) -> Held:
    listing: list[dict[str, Any]] = json.loads((folder / "ranks.json").read_text())
    shards = {tuple(sorted(entry["at"].items())): load_file(folder / entry["file"]) for entry in listing}
    assert len(shards) == len(listing), "two ranks say they are at one coordinate"
    return Held(grid, shards, np.load(folder / "logits.npy"))
