"""Megatron-Core jobs that save and load with us: what a test asks for."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.converters.megatron.write_support import Job, Ran, read_job
from tests.support.deepspeed_job import run_module


def run_jobs(jobs: Sequence[Job], *, timeout: float = 600) -> list[Ran]:
    """Run `jobs` one after another in one fresh process; skips where Megatron-Core is not installed."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; these tests save and load its jobs (pip install megatron-core)")
    ways = [job.form for job in jobs if job.load is not None]
    request = {"jobs": [dataclasses.asdict(job) for job in jobs], "ways": ways}
    run_module("tests.train.megatron.job", json.dumps(request), timeout=timeout)
    return [read_job(job) for job in jobs]


def assert_same_states(ours: Ran, theirs: Ran) -> None:
    """Every rank holds the same weights, values and states, bit for bit, and the same hyper-parameters.

    Megatron-Core writes the step into groups when it loads, where torch's Adam never looks for it.
    """
    assert ours.shards.keys() == theirs.shards.keys()
    for at, held in theirs.shards.items():
        assert ours.shards[at].keys() == held.keys()
        assert len(held) > 4
        for key, tensor in held.items():
            assert torch.equal(ours.shards[at][key], tensor), f"{key} at {at}"
    assert _without_step(ours.groups) == _without_step(theirs.groups)


def _without_step(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "step"} for group in groups]
