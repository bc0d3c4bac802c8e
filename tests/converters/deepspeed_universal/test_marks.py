"""What files say of how a tensor-parallel job cuts a parameter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.converters.deepspeed_universal.made import Made
from tests.support.deepspeed_job import job_environment
from ucp.container.torchfile import read_torch_file
from ucp.converters.deepspeed_universal import CONVERTER
from ucp.errors import UsageError
from ucp.store import open_store
from ucp.tree import Opaque

INFO = {
    "universal_checkpoint_version": 0.4,
    "original_vocab_size": 6,
    "vocabulary_parameter_patterns": [r"embed\.weight"],
    "parameter_with_row_parallelism_patterns": [r"\d+\.down"],
    "parameter_with_2_sub_params_cat_dim_0": [r"\d+\.up"],
    "parameter_with_sub_params": [
        {"patterns": [r"\d+\.qkv"], "shape": ((4, 2, 2), 3), "partition_dim": 0},
        {"patterns": [r"\d+\.experts"], "shape": (3, 4, 2), "partition_dim": 1},
        {"patterns": [r"\d+\.counted"], "shape": (3, -1), "partition_dim": 0},
    ],
}


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Made:
    found = Made(request.node.name)
    found.adam("embed.weight", 6, 2)
    found.adam("0.down", 2, 4)
    found.adam("0.up", 8, 2)
    found.adam("0.qkv", 8, 3)
    found.adam("0.experts", 12, 2)
    found.adam("0.counted", 6, 2)
    found.adam("norm", 4)
    return found


def marks(made: Made, name: str) -> dict[str, Any]:
    file = read_torch_file(made.out, f"global_step3_universal/zero/{name}/exp_avg.pt")
    root = file.root
    assert isinstance(root, dict)
    return {key: value for key, value in root.items() if key != "param"}


def shape_of(mark: Any) -> tuple[Any, Any]:
    assert isinstance(mark, Opaque)
    assert mark.path == "deepspeed.checkpoint.universal_checkpoint.SubparamShape"
    return mark.attribute("shape"), mark.attribute("partition_dim")


def test_every_file_says_how_it_is_cut(made: Made) -> None:
    made.write(made.catalog(state={"client_state": {"universal_checkpoint_info": INFO}}))
    assert marks(made, "embed.weight") == {"cat_dim": 0, "vocab_tensor": True}
    assert marks(made, "0.down") == {"cat_dim": 1}
    assert marks(made, "0.up") == {"cat_dim": 0, "param_n_sub_params": 2}
    assert marks(made, "norm") == {"cat_dim": 0}
    assert shape_of(marks(made, "0.qkv")["sub_param_shape"]) == (((4, 2, 2), 3), 0)
    assert shape_of(marks(made, "0.experts")["sub_param_shape"]) == ((3, 4, 2), 1)
    assert shape_of(marks(made, "0.counted")["sub_param_shape"]) == (((2, 2, 2), -1), 0)


def test_metadata_that_is_not_known_is_remarked_and_no_error(made: Made) -> None:
    newer = {**INFO, "universal_checkpoint_version": 0.9}
    catalog = made.catalog(state={"client_state": {"universal_checkpoint_info": newer}})
    made.write(catalog)
    assert marks(made, "0.down") == {"cat_dim": 0}
    notes = CONVERTER.target(catalog, made.store).notes
    assert any("without tensor parallelism" in note and "newer" in note for note in notes)


def test_metadata_that_differs_between_ranks_is_no_guide(made: Made) -> None:
    own = {1: {"client_state": {"universal_checkpoint_info": {"parameter_with_row_parallelism_patterns": ["x"]}}}}
    catalog = made.catalog(state={"client_state": {"universal_checkpoint_info": INFO}, "per_rank": own})
    made.write(catalog)
    assert marks(made, "0.down") == {"cat_dim": 0}
    assert any("not the same on all ranks" in note for note in CONVERTER.target(catalog, made.store).notes)


def test_metadata_of_other_names_is_remarked(made: Made) -> None:
    other = {"parameter_with_row_parallelism_patterns": ["layers.0.down"], "tp_replicated_parameter_patterns": ["n"]}
    catalog = made.catalog(state={"client_state": {"universal_checkpoint_info": other}})
    assert not any("other names" in note for note in CONVERTER.target(catalog, made.store).notes)
    del other["tp_replicated_parameter_patterns"]
    assert any("other names" in note for note in CONVERTER.target(catalog, made.store).notes)


def test_a_declaration_that_contradicts_the_shape_is_remarked_and_no_error(made: Made) -> None:
    wrong = {"parameter_with_sub_params": [{"patterns": ["norm"], "shape": ((4, 2), 3), "partition_dim": 0}]}
    catalog = made.catalog(state={"client_state": {"universal_checkpoint_info": wrong}})
    made.write(catalog)
    assert marks(made, "norm") == {"cat_dim": 0}
    assert any("norm" in note for note in CONVERTER.target(catalog, made.store).notes)


def test_a_source_that_was_not_tensor_parallel_is_for_such_jobs(made: Made) -> None:
    silent = {"vocabulary_parameter_patterns": ["embed"], "original_vocab_size": 6}
    catalog = made.catalog(state={"client_state": {"universal_checkpoint_info": silent}})
    assert any("degree 1" in note for note in CONVERTER.target(catalog, made.store).notes)
    told = made.catalog(state={"client_state": {"universal_checkpoint_info": INFO}})
    assert not any("degree 1" in note for note in CONVERTER.target(told, made.store).notes)


def test_a_model_file_for_each_rank(made: Made) -> None:
    made.write(made.catalog(), mp="3")
    for rank in range(3):
        for prefix in ("", "zero_pp_rank_0_"):
            assert made.load(f"{prefix}mp_rank_0{rank}_model_states.pt")["mp_world_size"] == 3
    with pytest.raises(UsageError, match="number of ranks"):
        CONVERTER.target(made.catalog(), made.store, mp="many")


LOAD = """
import json, sys, types, torch
from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state
found = []
for name, shape in json.loads(sys.argv[2]).items():
    for rank in (0, 1):
        value = torch.zeros(shape)
        whole = types.SimpleNamespace(start=0, numel=value.numel())
        mapping = types.SimpleNamespace(
            lp_fragment_address=whole, get_hp_fragment=lambda: value.view(-1), optim_fragment={}
        )
        parameter = types.SimpleNamespace(shape=value.shape, numel=value.numel, _hp_mapping=mapping)
        load_hp_checkpoint_state(parameter, f"{sys.argv[1]}/{name}", rank, 2)
        found.append(value.tolist())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_deepspeeds_loader_cuts_as_the_source_did(made: Made, tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; the loader is its own (pip install deepspeed)")
    made.out = open_store(str(tmp_path))
    made.write(made.catalog(state={"client_state": {"universal_checkpoint_info": INFO}}))
    shapes = {"0.down": (2, 2), "0.up": (4, 2), "0.qkv": (4, 3), "0.experts": (6, 2), "embed.weight": (4, 2)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "global_step3_universal" / "zero"), json.dumps(shapes)],
        env=job_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = iter(torch.tensor(value) for value in json.loads(done.stdout.splitlines()[-1]))

    # As `Made.adam` counts: each parameter's values begin at its number.
    embed, down = torch.arange(12.0).view(6, 2), torch.arange(8.0).view(2, 4) + 1
    up, qkv = torch.arange(16.0).view(8, 2) + 2, torch.arange(24.0).view(8, 3) + 3
    experts = torch.arange(24.0).view(3, 4, 2) + 4
    for rank in (0, 1):
        assert torch.equal(next(found), down.chunk(2, 1)[rank]), rank
    for rank in (0, 1):
        assert torch.equal(next(found), torch.cat([half.chunk(2)[rank] for half in up.chunk(2)]))
    for rank in (0, 1):
        assert torch.equal(next(found), torch.cat([part.chunk(2)[rank] for part in qkv.split([4, 2, 2])]))
    for rank in (0, 1):
        assert torch.equal(next(found), experts.chunk(2, 1)[rank].reshape(6, 2))
    padded = torch.cat([embed, torch.zeros(2, 2)])
    for rank in (0, 1):
        assert torch.equal(next(found), padded.chunk(2)[rank])
