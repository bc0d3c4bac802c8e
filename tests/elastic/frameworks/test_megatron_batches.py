"""The global batch in Megatron-Core's schedules: gradients are those of the whole batch, or nothing is computed."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from tests.support.deepspeed_job import run_module


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; these tests run its schedules (pip install megatron-core)")
    folder = str(tmp_path_factory.mktemp("batches"))
    told: dict[str, Any] = json.loads(run_module("tests.elastic.frameworks.megatron_batches", folder, timeout=500))
    return told


def test_gradients_of_uneven_micro_batches_are_those_of_the_whole_batch(found: dict[str, Any]) -> None:
    far = dict(found["far"])
    assert far.pop("dp ignored") > 1e-2
    assert len(far) == 6
    assert {name: one for name, one in far.items() if not one < 1e-5} == {}


def test_micro_batches_that_would_count_alike_are_refused(found: dict[str, Any]) -> None:
    told = found["refused"]
    uneven = "UsageError: micro-batches of 2 and 3 samples on 2 data-parallel ranks: "
    assert told["uneven"].startswith(f"{uneven}schedules of Megatron-Core count each alike, whatever its size")
    assert told["shapes"].startswith(f"{uneven}stages of the pipeline expect tensors of one shape")
    assert told["interleaved"].startswith(f"{uneven}stages of the pipeline expect tensors of one shape")
    assert ("variable_seq_lengths" in told["shapes"], "variable_seq_lengths" in told["interleaved"]) == (True, False)
    for name in ("uneven", "shapes", "interleaved"):
        assert 'Needs(divides={"dp": [samples // micro]})' in told[name]
    assert told["twice"].startswith("UsageError: weighted=True under calculate_per_token_loss")
    assert told["good"] == "2 2 2"


def test_samples_of_another_place_are_refused(found: dict[str, Any]) -> None:
    for name in ("seat", "ranks"):
        assert found["refused"][name].startswith("UsageError: the feed gave other samples than those of data-parallel")


def test_sizes_that_are_not_the_runs_are_refused(found: dict[str, Any]) -> None:
    told = found["refused"]
    assert told["sizes"].startswith("UsageError: the model's configuration has pipeline_model_parallel_size=1, and the")
    assert "order, pipeline_model_parallel_size is not free" in told["taken"]
    assert told["axis"].startswith("UsageError: dp2 fsdp2: Megatron-Core has no axis 'fsdp'")


def test_random_streams_go_on_by_coordinate_or_start_anew_where_there_is_none(found: dict[str, Any]) -> None:
    saved, wider, narrower = found["streams"]  # tp2; dp2 tp2; dp2
    shared, own = "data-parallel-rng", "model-parallel-rng"
    by_tp = {one["mesh"]["tp"]: one["goes on"] for one in saved}
    assert by_tp[0][own] != by_tp[1][own]
    assert all(one["goes on"] == by_tp[one["mesh"]["tp"]] for one in wider)
    assert {one["goes on"][shared] for one in narrower} == {by_tp[0][shared]}
    (anew,) = {one["goes on"][own] for one in narrower}  # all of them hold the same part of the model
    old = [drawn[own] for one in saved for drawn in (one["seeded"], one["goes on"])]
    assert anew not in [*old, narrower[0]["seeded"][own]]
    assert all("model-parallel-rng" in note and "starts anew" in note for one in narrower for note in one["notes"])
    assert len(narrower[0]["notes"]) == 1


def test_groups_lie_as_the_layout_says_and_wait_no_longer_than_the_run(found: dict[str, Any]) -> None:
    for of_rank in found["splits"]:
        for one in of_rank:
            assert one["seats"][0] == one["seats"][1]
            assert one["meshes"][0] == one["meshes"][1]
            assert one["longest"] == one["timeout"] == 100
    assert len({str([one["seats"] for one in of_rank]) for of_rank in found["splits"]}) == 4
