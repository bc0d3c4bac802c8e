"""Real DeepSpeed engines in runs: gradients of the global batch on any number of ranks, and refusals of others."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.elastic.frameworks.deepspeed_job import SAMPLES, build_model, dataset, mean_loss
from tests.support.deepspeed_job import run_module
from ucp.elastic import Batch, Feed
from ucp.elastic.deepspeed import batch_config

LIMIT = 900.0
QUICK: list[Any] = [["gradients", 3, [2]], ["refusals", 2, []], ["pipeline_refusals", 2, []]]


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 30))
def test_the_entries_are_those_that_deepspeed_accepts(samples: int, micro: int, ranks: int) -> None:
    """deepspeed/runtime/config.py, ``_batch_assertion``; no micro-batch is larger than is said."""
    batch = Batch(samples, micro=micro)
    if batch.problem(ranks) is not None:
        return
    entries = batch_config(batch, ranks)
    size, count = entries["train_micro_batch_size_per_gpu"], entries["gradient_accumulation_steps"]
    assert entries["train_batch_size"] == size * count * ranks
    shares = batch.shares(ranks)
    assert {len(share) for share in shares} == {count}
    assert size == max(len(part) for share in shares for part in share) <= micro
    assert entries["train_batch_size"] >= samples
    assert (entries["train_batch_size"] == samples) == (samples % (count * ranks) == 0)


def ran(folder: Path, *jobs: list[Any]) -> list[Any]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; this test runs its engines (pip install deepspeed)")
    out = folder / "found.json"
    run_module("tests.elastic.frameworks.deepspeed_checks", json.dumps([jobs, str(out)]), timeout=LIMIT)
    return json.loads(out.read_text())


def gradients() -> torch.Tensor:
    """Those of the mean over the samples of the first step, computed at once."""
    model, feed = build_model(), Feed(dataset(), Batch(SAMPLES, micro=SAMPLES), seed=3)
    for (inputs, wanted), _ in feed.step():
        mean_loss(model(inputs), wanted).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def check_gradients(given: list[Any], found: list[Any]) -> None:
    truth = gradients()
    for job, ranks in zip(given, found, strict=True):
        for one in ranks:
            assert torch.allclose(torch.tensor(one["gradients"]), truth, rtol=1e-4, atol=2e-7), job
            assert (one["samples"], one["batch"]) == (SAMPLES, SAMPLES), job


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the quick jobs gave; DeepSpeed is imported once for them."""
    folder = tmp_path_factory.mktemp("deepspeed")
    return ran(folder, *[[*job, [*given, str(folder)]] for *job, given in QUICK])


def test_gradients_are_those_of_the_global_batch_whoever_shares_it(found: list[Any]) -> None:
    """11 samples in micro-batches of 3 at most: on three ranks six of 1 or 2, and DeepSpeed is told of 12."""
    check_gradients(QUICK[:1], found[:1])


@pytest.mark.slow
def test_gradients_are_those_of_the_global_batch_under_every_stage(tmp_path: Path) -> None:
    jobs = [["gradients", ranks, [stage, str(tmp_path)]] for stage in range(4) for ranks in (1, 2, 3, 4)]
    check_gradients(jobs, ran(tmp_path, *jobs))


def test_what_would_train_with_another_scale_is_refused(found: list[Any]) -> None:
    _, (told, other), stages = found
    assert told == other
    said = {
        "accumulation": "gradient_accumulation_steps=1 in DeepSpeed's configuration, for 2 micro-batches",
        "accumulation-in-step": "gradient_accumulation_steps=1 in DeepSpeed's configuration, for 2 micro-batches",
        "size": "train_batch_size=256 in DeepSpeed's configuration, for Batch(samples=11, micro=3)",
        "sum": "gradient_allreduce_op adds the gradients of ranks up",
        "unmanaged": "managed_gradient_accumulation=false counts micro-batches",
        "tp": "DeepSpeed averages gradients over 2 ranks, and in dp1 tp2 there are 1 with samples of their own",
        "sp": "sequence_parallel_size=2",
        "placed": "DeepSpeed averages gradients over 2 ranks, and samples are placed for 1",
        "by-hand": "gradients of this job have another scale on each number of ranks",
        "none": "the engine did 0 backward passes in a micro-batch",
        "twice": "a micro-batch has one loss, and this one had it",
        "early": "the engine is between two steps: it added up 1 of 2 gradients",
        "no-pipeline": "DeepSpeedEngine is no pipeline",
        "spares": "dp1 leaves ranks of 2 over, and the process group has them all",
    }
    assert told.keys() == said.keys()
    assert not {name: told[name] for name, words in said.items() if words not in told[name]}
    assert not [name for name, text in told.items() if text.endswith("hint: None")]
    assert "10 samples are not 3 micro-batches of one size" in stages[0]["uneven"]
    assert "a pipeline takes a whole step at once" in stages[0]["micro"]


@pytest.mark.slow
def test_a_pipeline_goes_on_with_other_replicas_and_stages(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    starts = [(2, 3, 2), (4, 6, 2), (3, 9, 3)]
    found = ran(tmp_path, *[["piped", ranks, [url, until, stages]] for ranks, until, stages in starts])
    truth = piped_losses(9)
    for first, ((_, until, _), ranks) in zip((1, 4, 7), zip(starts, found, strict=True), strict=True):
        for one in ranks:
            assert one["losses"] == {
                str(step): pytest.approx(truth[step], rel=1e-4) for step in range(first, until + 1)
            }
            assert one["samples"] == one["position"] == 12 * until


def piped_losses(until: int) -> dict[int, float]:
    """Of a plain loop without pipeline or ranks."""
    model, feed = build_model(), Feed(dataset(), Batch(12, micro=12), seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found = {}
    for step in range(1, until + 1):
        for (inputs, wanted), _ in feed.step():
            loss = mean_loss(model(inputs), wanted)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found[step] = loss.item()
    return found
