"""The training jobs whose checkpoints are read, and how what is read is compared with what their optimizers held."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.programs.megatron.models import (
    BIASED,
    GPT,
    LLAMA,
    MIXED,
    MIXTRAL,
    QWEN2,
    QWEN3,
    UNEVEN,
    axes,
    flags,
    program,
    sizes,
)
from tests.support.megatron import Grid, Model
from tests.support.megatron_trained import STATES, Job, Trained
from ucp.catalog import Catalog
from ucp.converters.megatron import CONVERTER
from ucp.lang.arrays import gather
from ucp.layout import Box, Mesh
from ucp.run.gather import read_region
from ucp.store import Store, open_store

DENSE = Job(LLAMA, Grid(tp=2), ("fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter", "legacy"))
INTERLEAVED = Job(GPT, Grid(pp=2, vpp=2), ("fully_reshardable", "dp_reshardable", "legacy"))
EXPERTS = Job(MIXTRAL, Grid(ep=2, dp=2), ("fully_reshardable", "dp_reshardable", "legacy"))
PLAIN = Job(QWEN2, Grid(tp=2, pp=2), ("plain", "legacy"), distributed=False)
GROUPED = Job(
    Model("grouped", experts=4, grouped=True), Grid(ep=2, dp=2), ("fully_reshardable", "dp_reshardable", "legacy")
)
"""Experts of a rank are one parameter, transposed."""

HALF = Job(LLAMA, Grid(), ("plain", "legacy"), dtype="fp16", distributed=False)
OLD = Job(GPT, Grid(tp=2), ("legacy",), distributed=False)
JOBS = (DENSE, INTERLEAVED, EXPERTS, PLAIN, HALF, OLD)

SEVERAL = Job(QWEN3, Grid(tp=2, pp=2), ("dp_reshardable", "fully_reshardable", "legacy"), bucket=3000)
SLOW_JOBS = (
    SEVERAL,
    Job(GPT, Grid(pp=2, dp=2), ("fully_reshardable", "dp_reshardable", "legacy")),
    Job(MIXED, Grid(ep=2, dp=2), ("fully_reshardable", "dp_reshardable", "legacy")),
    Job(LLAMA, Grid(dp=2), ("fully_reshardable", "dp_reshardable", "legacy"), dtype="fp32"),
    Job(LLAMA, Grid(tp=2, dp=2), ("plain", "legacy"), dtype="fp32", distributed=False),
    Job(LLAMA, Grid(tp=4), ("dp_reshardable", "legacy")),
    Job(LLAMA, UNEVEN, ("dp_reshardable", "fully_reshardable")),
    Job(LLAMA, Grid(tp=2), ("dp_reshardable", "fully_reshardable"), per_layer=True),
    Job(MIXTRAL, Grid(tp=2, ep=2), ("plain", "legacy"), dtype="fp32", distributed=False),
    Job(MIXTRAL, Grid(tp=2, etp=2), ("dp_reshardable", "fully_reshardable", "legacy")),
    Job(MIXTRAL, Grid(tp=2, dp=2, ep=2, etp=2), ("dp_reshardable", "legacy")),
    Job(MIXTRAL, Grid(tp=2), ("dp_reshardable", "fully_reshardable", "legacy")),
    Job(BIASED, Grid(tp=2, ep=2), ("fully_reshardable", "dp_reshardable", "legacy")),
    GROUPED,
    Job(GROUPED.model, Grid(tp=2, etp=2), ("plain", "legacy"), distributed=False),
    Job(GROUPED.model, Grid(tp=2, dp=2, etp=2), ("dp_reshardable", "dp_zero_gather_scatter")),
)

Arrays = dict[tuple[str, str], np.ndarray]
_AS_BITS = {"bfloat16": np.dtype(np.uint16)}


def truth(trained: Trained) -> Arrays:
    """Every state of every logical tensor, put together from what the optimizers of the ranks held."""
    job, found = trained.job, {}
    spoken = program(job.model)
    known = axes(spoken)
    mesh = Mesh({axis: size for axis, size in job.grid.mesh.items() if axis in known})
    for state in STATES:
        shards = {tuple(p for p in at if p[0] in known): held for at, held in trained.truth[state].items()}
        asked: dict[str, Any] = {} if state == "value" else {"state": state}
        whole = gather(spoken, shards, mesh=mesh, sizes=sizes(job.model), flags=flags(job.model), **asked)
        found |= {(name, state): array for name, array in whole.items()}
    return found


def catalog_of(path: Path, **options: Any) -> tuple[Catalog, Store]:
    """The checkpoint at `path`, and the store it lies in."""
    store = open_store(str(path))
    return CONVERTER.read(store, **options), store


def array_of(catalog: Catalog, store: Store, name: str, state: str, box: Box | None = None) -> np.ndarray:
    """A state as an array, or a region of it; bfloat16 as its bits."""
    cover = catalog.cover(name, state)
    box = box or Box.whole(cover.spec.shape)
    dtype = _AS_BITS.get(cover.spec.dtype) or np.dtype(cover.spec.dtype)
    return read_region(store, cover, box).view(dtype).reshape(box.shape)


def assert_holds(catalog: Catalog, store: Store, expected: Mapping[tuple[str, str], np.ndarray]) -> None:
    """Exactly the states of `expected`, bit by bit; a tied head may be an alias."""
    wanted = {key: array for key, array in expected.items() if key[0] not in catalog.ties}
    assert {(name, state) for name, held in catalog.tensors.items() for state in held.states} == set(wanted)
    for (name, state), array in wanted.items():
        found = array_of(catalog, store, name, state)
        assert found.dtype == array.dtype, name
        np.testing.assert_array_equal(found, array, err_msg=f"{name} {state}", strict=True)
    for alias, name in catalog.ties.items():
        np.testing.assert_array_equal(array_of(catalog, store, name, "value"), expected[alias, "value"])


def edit(path: Path, change: Any) -> None:
    """Load a file of torch.save, let `change` work on it, and save it again."""
    held = torch.load(path, weights_only=False)
    change(held)
    torch.save(held, path)
