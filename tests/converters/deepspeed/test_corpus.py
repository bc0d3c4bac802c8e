"""The corpus of real DeepSpeed checkpoints that lies beside the repository, where it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ucp
from tests.converters.deepspeed.audit import audit_bytes, audit_entries
from tests.converters.deepspeed.oracle import differences, load_truth
from ucp.catalog import Catalog
from ucp.converters.deepspeed import CONVERTER
from ucp.store import open_store

CORPUS = Path(__file__).parents[4] / "shared" / "corpus" / "cases"
REFUSED = ("ds_tp_", "ds_moe_")
TENSOR_PARALLEL = sorted(path.name for path in CORPUS.glob("ds_tp_*"))
CASES = sorted(path.name for path in CORPUS.glob("ds_*") if not path.name.startswith(REFUSED))

pytestmark = pytest.mark.skipif(
    not CORPUS.is_dir(), reason="the corpus of real checkpoints is not beside this repository"
)

# Under ZeRO 0 in fp32 nothing tells the frozen adapter's bias from norms of the same shape.
OPTIONS: dict[str, dict[str, Any]] = {"ds_z0_fp32_dp2": {"frozen": "adapter.*"}}
NOT_SAVED = {"buffer/tmp_np"}


def read(name: str) -> Catalog:
    return CONVERTER.read(open_store(str(CORPUS / name / "ckpt")), **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", CASES)
def test_every_state_equals_the_truth(name: str) -> None:
    catalog = read(name)
    truth = {k: v for k, v in load_truth(CORPUS / name / "truth.safetensors").items() if k not in NOT_SAVED}
    if not catalog.witnesses:
        truth = {k: v for k, v in truth.items() if not k.startswith("lowp/")}
    assert differences(CORPUS / name / "ckpt", catalog, truth) == []
    layout = json.loads((CORPUS / name / "case.json").read_text())["layout"]
    assert catalog.source.detail["zero_stage"] == layout["zero"]
    assert [catalog.source.mesh[axis] for axis in ("pp", "tp", "dp")] == [layout[axis] for axis in ("pp", "tp", "dp")]
    assert catalog.step == 5


@pytest.mark.parametrize("name", CASES)
def test_every_byte_is_accounted_for(name: str) -> None:
    assert audit_bytes(CORPUS / name / "ckpt", read(name)) == []


@pytest.mark.parametrize("name", CASES)
def test_every_entry_is_accounted_for(name: str) -> None:
    assert audit_entries(CORPUS / name / "ckpt", read(name)) == []


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_every_state_of_tensor_parallel_ranks_equals_the_truth(name: str) -> None:
    layout = json.loads((CORPUS / name / "case.json").read_text())["layout"]
    with ucp.open(str(CORPUS / name / "ckpt")) as checkpoint:
        catalog = checkpoint.catalog
        assert [catalog.source.mesh[axis] for axis in ("pp", "tp", "dp")] == [1, 2, layout["dp"]]
        left = {(tensor.name, state) for tensor in catalog.tensors.values() for state in tensor.states}
        for key, value in load_file(str(CORPUS / name / "truth.safetensors")).items():
            kind, _, tensor_name = key.partition("/")
            # The truth lists buffers that the model does not save.
            if kind in ("lowp", "buffer"):
                continue
            state = "value" if kind == "param" else kind
            assert torch.equal(checkpoint[tensor_name][state][...], value), key
            left.remove((tensor_name, state))
        assert not left


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.glob("ds_moe_*")))
def test_experts_that_are_spread_over_ranks(name: str) -> None:
    catalog = read(name)
    truth = load_truth(CORPUS / name / "truth.safetensors")
    assert differences(CORPUS / name / "ckpt", catalog, truth) == []
    assert audit_bytes(CORPUS / name / "ckpt", catalog) == audit_entries(CORPUS / name / "ckpt", catalog) == []


def test_trap_1_values_are_not_those_of_deepspeeds_own_answer_under_round_robin() -> None:
    name = "ds_z2_bf16_dp4_rr"
    wrong = load_truth(CORPUS / name / "ds_api_WRONG.safetensors")
    assert len(differences(CORPUS / name / "ckpt", read(name), wrong)) > 50
    assert any(note.startswith("round_robin_gradients") for note in read(name).notes)


def test_shapes_under_zero_0_leave_four_parameters_open_and_all_others_right() -> None:
    root = CORPUS / "ds_z0_fp32_dp2" / "ckpt"
    catalog = CONVERTER.read(open_store(str(root)))
    undecided = {name for name, tensor in catalog.tensors.items() if tensor.undecided}
    assert undecided == {"blocks.1.fc2.bias", "adapter.bias", "lnf.weight", "lnf.bias"}
    truth = load_truth(CORPUS / "ds_z0_fp32_dp2" / "truth.safetensors")
    truth = {k: v for k, v in truth.items() if k not in NOT_SAVED and not k.startswith("lowp/")}
    moments = {f"{n}: no state {s}" for n in undecided - {"adapter.bias"} for s in ("exp_avg", "exp_avg_sq")}
    assert set(differences(root, catalog, truth)) == {*moments, "frozen/adapter.bias: read as parameter"}
    assert audit_bytes(root, catalog) == audit_entries(root, catalog) == []


def test_cpu_adam_keeps_its_step_as_a_number() -> None:
    catalog = read("ds_z2_bf16_dp2_cpuadam")
    assert {(s.value, s.dtype) for t in catalog.tensors.values() for s in t.scalars.values()} == {(5, "int")}
