"""The files of a universal folder, as torch itself reads them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

import ucp
from tests.converters.deepspeed_universal.made import Made
from ucp.catalog import ParamGroup, Tensor
from ucp.container.values import Reference
from ucp.converters.deepspeed_universal import CONVERTER
from ucp.errors import CorruptError, FitError, NotFoundError, UsageError
from ucp.layout import Box
from ucp.plan import Extent, Fragment, Key, TensorSpec
from ucp.tree import Opaque, TensorLeaf


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Made:
    return Made(request.node.name)


def test_states_are_whole_tensors_in_dicts(made: Made) -> None:
    made.adam("a.weight", 5, 7)
    made.write(made.catalog())
    for state, factor in (("fp32", 1), ("exp_avg", 2), ("exp_avg_sq", 3)):
        found = made.load(f"zero/a.weight/{state}.pt")
        assert found.keys() == {"param", "cat_dim"}
        assert found["cat_dim"] == 0
        assert torch.equal(found["param"], torch.arange(35.0).view(5, 7) * factor)
    assert torch.equal(made.load("zero/a.weight/step.pt"), torch.tensor(3.0))
    assert made.out.read("latest_universal") == b"global_step3_universal"


def test_a_scalar_parameter_gets_a_dim_that_the_loader_can_cut_along(made: Made) -> None:
    made.adam("scale")
    made.add("count", "buffer", value=np.asarray(7))
    made.write(made.catalog())
    assert made.load("zero/scale/fp32.pt")["param"].shape == (1,)
    assert made.load("zero/count/fp32.pt")["param"].shape == ()
    read = CONVERTER.read(made.out)
    assert read.tensors["scale"].states["exp_avg"].shape == ()
    assert read.tensors["count"].states["value"].shape == ()


def test_parameters_without_states_are_filled_up(made: Made) -> None:
    made.adam("a", 3)
    made.add("spare", step=None, value=np.ones((5, 7), "float32"))
    made.write(made.catalog())
    assert torch.equal(made.load("zero/spare/exp_avg_sq.pt")["param"], torch.zeros(5, 7))
    assert torch.equal(made.load("zero/spare/step.pt"), torch.tensor(3.0))


def test_too_many_zeros_are_refused_before_anything_is_written(made: Made) -> None:
    made.adam("a", 3)
    shape = (1 << 14, 1 << 13)
    made.tensors["spare"] = Tensor("spare", "parameter", {"value": TensorSpec(shape, "float32")})
    extent = Extent("none", 0, shape, (0, 0), "float32")
    made.fragments[Key("spare", "value")] = (Fragment(Box.whole(shape), extent),)
    with pytest.raises(FitError, match="zeros for its 'exp_avg' are too many"):
        CONVERTER.target(made.catalog(), made.store)


def test_odd_names_are_folders(made: Made) -> None:
    for name in ("a/b.weight", "blocks.0 (copy)", "ü", "step"):
        made.adam(name, 2)
    made.write(made.catalog())
    read = CONVERTER.read(made.out)
    assert read.tensors.keys() == made.tensors.keys()


def test_hyper_parameters_by_group(made: Made) -> None:
    made.adam("a", 2)
    made.adam("b", 2)
    groups = (
        ParamGroup(("a",), {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": 1}),
        ParamGroup(("b",), {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}),
    )
    made.write(made.catalog(groups))
    found = made.load("zero/optimizer_state.pt")
    assert [group for group in found["param_groups"] if group["params"]] == [
        {**group.options, "params": [i]} for i, group in enumerate(groups)
    ]
    # The loaders of ZeRO-1 and 2 stop at the shorter of two lists, and would leave the job's other groups unloaded.
    assert len(found["param_groups"]) > 60
    assert found["optimizer_state_dict"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]
    assert torch.equal(found["optimizer_state_dict"]["state"][0]["step"], torch.tensor(3.0))
    assert CONVERTER.read(made.out).param_groups == groups


def test_zero_3_finds_no_model_file_where_it_would_drop_a_state(made: Made) -> None:
    one = np.ones(2, "float32")
    made.add("a", value=one, exp_avg=one, exp_avg_sq=one, max_exp_avg_sq=one)
    made.write(made.catalog())
    files = made.out.children("global_step3_universal")
    assert "mp_rank_00_model_states.pt" in files
    assert "zero_pp_rank_0_mp_rank_00_model_states.pt" not in files
    assert "optimizer_state_dict" not in made.load("zero/optimizer_state.pt")


def test_training_state_comes_back_as_it_was(made: Made) -> None:
    made.adam("a", 2)
    made.store.put("rng.bin", bytes(range(8)))
    rng = TensorLeaf(Extent.contiguous("rng.bin", 2, (4,), "uint8"))
    array = TensorLeaf(Extent.contiguous("", 0, (2,), "float64"), numpy=True, inline=np.array([1.5, 2.5]).tobytes())
    state = {
        "lr_scheduler": {"last_epoch": 3},
        "global_steps": 3,
        "skipped_steps": 1,
        "mp_world_size": 4,
        "client_state": {
            "rng": rng,
            "array": array,
            "args": Opaque("argparse", "Namespace", state={"lr": 0.1, "layers": [1, 2]}),
            "set": {1, 2},
        },
        "per_rank": {0: {"client_state": {"seed": 10}}, 1: {"client_state": {"seed": 11}}},
    }
    catalog = made.catalog(state=state)
    made.write(catalog)
    found = made.load("mp_rank_00_model_states.pt", weights_only=False)
    assert found == made.load("zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False) | {
        "rng": found["rng"],
        "array": found["array"],
    }
    assert torch.equal(found["rng"], torch.tensor([2, 3, 4, 5], dtype=torch.uint8))
    assert np.array_equal(found["array"], [1.5, 2.5])
    assert found["args"] == argparse.Namespace(lr=0.1, layers=[1, 2])
    assert (found["set"], found["seed"], found["lr_scheduler"]) == ({1, 2}, 10, {"last_epoch": 3})
    assert (found["global_steps"], found["skipped_steps"], found["mp_world_size"]) == (3, 1, 1)
    assert found["dp_world_size"] == 2
    assert any("rank 0" in note for note in CONVERTER.target(catalog, made.store).notes)


def test_code_is_never_carried_over(made: Made) -> None:
    made.adam("a", 2)
    evil = Opaque("os", "system", ("echo pwned",))
    state = {
        "client_state": {"evil": evil, "kept": 1, "deep": {"evil": [evil], "kept": 2}},
        "lr_scheduler": {"lr_lambdas": [Reference("os", "system")], "last_epoch": 3},
        "optimizer": {"loss_scaler": evil},
    }
    groups = (ParamGroup(("a",), {"lr": 0.1, "evil": evil}),)
    catalog = made.catalog(groups, state=state)
    made.write(catalog)
    for entry in made.out.entries():
        assert b"pwned" not in made.out.read(entry.path)
        assert b"os\nsystem" not in made.out.read(entry.path)
    found = made.load("mp_rank_00_model_states.pt")
    assert (found["kept"], found["deep"], found["lr_scheduler"]) == (1, {"kept": 2}, {"last_epoch": 3})
    notes = "\n".join(CONVERTER.target(catalog, made.store).notes)
    for path in ("client_state.evil", "client_state.deep.evil", "state.lr_scheduler.lr_lambdas", "param_groups.0.evil"):
        assert path in notes


@pytest.mark.parametrize(
    ("saved", "name", "expected"),
    [
        ({}, None, {}),
        ({"loss_scaler": Opaque("x", "LossScaler", state={"cur_scale": 1.0, "dynamic": False})}, None, {}),
        ({"cur_scale": 128.0, "dynamic_loss_scale": False}, "LossScaler", {"cur_scale": 128.0, "dynamic": False}),
        (
            {"cur_scale": 8.0, "dynamic_loss_scale": True, "cur_iter": 7, "last_overflow_iter": 5, "scale_window": 2},
            "DynamicLossScaler",
            {"cur_scale": 8.0, "cur_iter": 7, "last_overflow_iter": 5, "scale_window": 2, "delayed_shift": 1},
        ),
    ],
    ids=["none", "of another precision", "static", "of ZeRO-0"],
)
def test_the_loss_scale(saved: Mapping[str, Any], name: str | None, expected: Mapping[str, Any]) -> None:
    from ucp.converters._deepspeed_universal.scaler import loss_scale

    found = loss_scale(saved)
    if name is None:
        assert found == {}
    else:
        assert found["loss_scaler"].path == f"deepspeed.runtime.fp16.loss_scaler.{name}"
        assert found["loss_scaler"].state.items() >= expected.items()
        assert found["dynamic_loss_scale"] is (name == "DynamicLossScaler")


def test_bad_options(made: Made) -> None:
    made.adam("a", 2)
    with pytest.raises(UsageError, match="unknown option 'shard_bytes'"):
        CONVERTER.target(made.catalog(), made.store, shard_bytes=1)
    with pytest.raises(UsageError, match="is not a tag"):
        CONVERTER.target(made.catalog(), made.store, tag="a/b")


def test_a_converted_folder_opens(made: Made) -> None:
    made.adam("a", 2, 3)
    made.add("b", "frozen", value=np.ones(4, "float32"))
    made.write(made.catalog(ties={"head": "a"}), tag="best")
    with ucp.open(made.out.url) as checkpoint:
        assert checkpoint.family == "deepspeed-universal"
        assert checkpoint.step == 3
        assert checkpoint.ties == {"head": "a"}
        assert torch.equal(checkpoint["head"]["exp_avg"][...], torch.arange(6.0).view(2, 3) * 2)
        assert checkpoint["a"].scalars == {"step": 3.0}
        assert [checkpoint[name].kind for name in ("a", "b")] == ["parameter", "frozen"]


def test_incomplete_and_damaged_folders_do_not_open(made: Made) -> None:
    made.adam("a", 2, 3)
    made.adam("b", 4)
    made.write(made.catalog())
    folder = "global_step3_universal"
    whole = {entry.path: made.out.read(entry.path) for entry in made.out.entries()}
    for path, error in [
        (f"{folder}/zero/a/fp32.pt", CorruptError),
        (f"{folder}/zero/a/exp_avg.pt", NotFoundError),
        (f"{folder}/zero/optimizer_state.pt", NotFoundError),
        ("latest_universal", NotFoundError),
    ]:
        made.out.delete(path)
        with pytest.raises(error):
            CONVERTER.read(made.out)
        made.out.put(path, whole[path])
    for path in (folder_files := [path for path in whole if path.startswith(f"{folder}/zero/a/")]):
        made.out.delete(path)
    with pytest.raises(NotFoundError, match="zero/a: missing"):
        CONVERTER.read(made.out)
    for path in folder_files:
        made.out.put(path, whole[path])
    cut = whole[f"{folder}/zero/a/exp_avg.pt"]
    made.out.put(f"{folder}/zero/a/exp_avg.pt", cut[: len(cut) // 2])
    with pytest.raises(CorruptError, match=r"exp_avg\.pt"):
        CONVERTER.read(made.out)
    for path in (f"{folder}/mp_rank_00_model_states.pt", f"{folder}/zero_pp_rank_0_mp_rank_00_model_states.pt"):
        made.out.delete(path)
    with pytest.raises(NotFoundError, match=r"no mp_rank_00_model_states\.pt here"):
        CONVERTER.read(made.out)


@pytest.mark.parametrize("text", ["../other", "/etc", "a\nb", ""])
def test_latest_universal_leads_nowhere_else(made: Made, text: str) -> None:
    made.adam("a", 2)
    made.write(made.catalog())
    made.out.put("latest_universal", text.encode())
    with pytest.raises(UsageError, match="is not a tag"):
        CONVERTER.read(made.out)


def test_a_loss_scale_that_no_deepspeed_saved_is_told(made: Made) -> None:
    made.adam("w", 3)
    told = CONVERTER.target(made.catalog(state={"loss_scale": {"scale": 1024.0}}), made.store).notes
    assert any("loss scale 1024.0" in note and "initial_scale_power" in note for note in told)
    assert not any("loss scale" in note for note in CONVERTER.target(made.catalog(), made.store).notes)
