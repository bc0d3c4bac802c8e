"""Weights of Hugging Face models, written for Megatron-Core: its own strict loading, and its own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.converters.megatron.write_support import Job, Ran, run_jobs
from tests.programs.megatron.models import GPT, LLAMA, MIXTRAL, QWEN2, QWEN3, assert_same, logical
from tests.programs.megatron.test_core_hf import TWINS
from tests.support.megatron import Grid, Model, tokens
from ucp.layout import Box
from ucp.mapping import read_source
from ucp.run.convert import convert
from ucp.run.gather import read_region


@dataclass(frozen=True)
class Case:
    """A model, the ranks it is for, and how it is written."""

    model: Model
    grid: Grid
    form: str = "torch_dist"
    layers: str = "stacked"

    @property
    def name(self) -> str:
        return f"{self.model.name}-{self.grid.name}-{self.form}-{self.layers}"


FAST = [
    Case(LLAMA, Grid(tp=2), layers="each"),
    Case(QWEN2, Grid(pp=2), form="legacy"),
    Case(MIXTRAL, Grid(ep=2, dp=2)),
]
SLOW = [
    Case(LLAMA, Grid(tp=2, pp=2), form="legacy"),
    Case(LLAMA, Grid(tp=4)),
    Case(LLAMA, Grid(pp=2, vpp=2), form="legacy"),
    Case(GPT, Grid(tp=2, pp=2)),
    Case(GPT, Grid(tp=2, pp=2), form="legacy"),
    Case(QWEN2, Grid(tp=2, pp=2)),
    Case(QWEN3, Grid(tp=2), form="legacy"),
    Case(MIXTRAL, Grid(tp=2, dp=2, ep=2, etp=2), form="legacy"),
    Case(MIXTRAL, Grid(tp=2, ep=2)),
]


def module(model: Model) -> Any:
    """A Hugging Face model with weights that leave no symmetry."""
    twin = TWINS[model]
    cls = getattr(transformers, twin.cls)
    torch.manual_seed(5)
    made = cls(cls.config_class(**twin.config)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(0, 0.15)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1)
    return made


@dataclass(frozen=True)
class Written:
    """A Hugging Face folder, what Megatron-Core held of what was made of it, and the logits of both."""

    source: Path
    ran: Ran
    logits: np.ndarray


def write(cases: Sequence[Case], folder: Path) -> list[Written]:
    """Save, convert, and load in one process of Megatron-Core."""
    sources, logits, jobs = [], [], []
    for number, case in enumerate(cases):
        source, made = folder / f"{number}-hf", folder / f"{number}-megatron"
        original = module(case.model)
        original.save_pretrained(source)
        with torch.no_grad():
            logits.append(original(torch.from_numpy(tokens(case.model))).logits.numpy())
        axes = ("tp", "pp", "vpp", "ep", "etp")
        convert(
            str(source),
            str(made),
            to="megatron",
            mesh={axis: case.grid.mesh[axis] for axis in axes},
            to_sizes={"divisible": case.model.divisible},
            to_flags={"te": False},
            form=case.form,
            layers=case.layers,
        )
        assert (made / "latest_checkpointed_iteration.txt").read_text() == "release"
        kind = {"form": case.form, "bf16": False, "distributed": False, "optimizer": False, "logits": True}
        jobs.append(Job(case.model, case.grid, str(folder / f"{number}-out"), load=str(made / "release"), **kind))
        sources.append(source)
    ran = run_jobs(jobs)
    return [Written(*found) for found in zip(sources, ran, logits, strict=True)]


def check(case: Case, found: Written) -> None:
    """Weights bit for bit, logits within what the order of sums changes."""
    catalog, store = read_source(str(found.source), program="auto")
    expected = {
        name: read_region(store, catalog.cover(name, "value"), Box.whole(spec.shape))
        .view(np.float32)
        .reshape(spec.shape)
        for name, spec in ((name, tensor.states["value"]) for name, tensor in catalog.tensors.items())
    }
    if case.model.tied and case.grid.pp > 1:  # the last stage has a copy of its own
        expected["lm_head.weight"] = expected["embed.weight"]
    assert_same(logical(case.model, found.ran.arrays("value")), expected)
    np.testing.assert_allclose(found.ran.logits, found.logits, atol=1e-4)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """All fast cases."""
    found = write(FAST, tmp_path_factory.mktemp("fast"))
    return {case.name: one for case, one in zip(FAST, found, strict=True)}


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_megatron_loads_and_computes(case, fast):
    check(case, fast[case.name])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_megatron_loads_and_computes_everywhere(case, tmp_path):
    check(case, *write([case], tmp_path))
