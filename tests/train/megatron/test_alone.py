"""One Megatron-Core rank: what is refused, and what is kept beside tensors."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from tests.support.deepspeed_job import run_module


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; these tests save and load its jobs (pip install megatron-core)")
    told = run_module("tests.train.megatron.alone", str(tmp_path_factory.mktemp("alone")), timeout=300)
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def test_values_that_are_not_the_weights_are_refused(scenes: dict[str, Any]) -> None:
    assert scenes["drifted"].startswith("ConflictError: ")
    assert "fp32 values in the optimizer's dict are not those of the weights" in scenes["drifted"]


def test_optimizer_without_its_model_is_refused(scenes: dict[str, Any]) -> None:
    assert scenes["without_model"].startswith("FitError: the optimizer trains a parameter of shape [104, 48]")


def test_other_shapes_are_refused_before_anything_changes(scenes: dict[str, Any]) -> None:
    told, unchanged = scenes["other_size"]
    assert "decoder.layers.mlp.linear_fc2.weight ([2, 48, 76] in the source, [2, 48, 80] in the target)" in told
    assert unchanged


def test_weights_alone_are_refused_while_an_optimizer_keeps_their_values(scenes: dict[str, Any]) -> None:
    told, unchanged, restored = scenes["without_optimizer"]
    assert told.startswith("UsageError: ")
    assert "with which the next step would undo the load" in told
    assert (unchanged, restored) == (True, True)


def test_schedule_of_other_settings_is_refused(scenes: dict[str, Any]) -> None:
    assert scenes["other_schedule"].startswith("FitError: ")
    assert "1.0 and checkpointvalue 0.005 for learning rate do not match" in scenes["other_schedule"]


def test_strategy_tells_other_backends(scenes: dict[str, Any]) -> None:
    assert scenes["other_backend"] == ("CheckpointingException: this strategy loads ucp checkpoints, not torch_dist")


def test_what_is_not_there_is_an_error(scenes: dict[str, Any]) -> None:
    assert scenes["not_there"].startswith("CheckpointingException: ")
    assert scenes["not_there"].endswith("has no output_layer.weight")


def test_checkpoint_tells_its_tensors_and_is_found_without_a_strategy(scenes: dict[str, Any]) -> None:
    states_equal, weights_equal, weight, master, keys = scenes["plain_tensors"]
    assert (states_equal, weights_equal) == (True, True)
    assert (weight, master) == ("torch.bfloat16", "torch.float32")
    assert keys == 4 * 9


def test_buffers_of_the_distributed_optimizer_are_kept_as_they_are(scenes: dict[str, Any]) -> None:
    assert scenes["buffers"] == [True, True, True]


def test_loss_scale_random_streams_and_extra_states_go_on(scenes: dict[str, Any]) -> None:
    assert scenes["objects"] == ["scales", 1024.0, 0, True]


def test_experts_that_are_one_parameter_are_stored_one_by_one(scenes: dict[str, Any]) -> None:
    assert scenes["grouped"] == [True, [2, 4, 72, 48]]
