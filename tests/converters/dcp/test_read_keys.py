"""Keys as jobs choose them: where the model is, what an optimizer is, and what lies around."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import set_crc32_options

from tests.support.dcp_alone import edit, sample, save
from ucp.catalog import Catalog
from ucp.container.torchfile import leaf_numpy
from ucp.converters._dcp.names import below, cleaned, split_name
from ucp.converters.dcp import CONVERTER
from ucp.errors import FitError
from ucp.layout import Box
from ucp.layout.dtypes import ITEMSIZE
from ucp.run.gather import read_region
from ucp.store import open_store
from ucp.training import progress

NAMES = ["a.weight", "a.bias"]


def read(state: dict[str, Any], folder: Path, **options: object) -> Catalog:
    return CONVERTER.read(open_store(str(save(state, folder))), **options)


def values(catalog: Catalog, name: str, state: str = "value") -> np.ndarray[Any, Any]:
    store = open_store(catalog.url)
    cover = catalog.cover(name, state)
    data = read_region(store, cover, Box.whole(cover.spec.shape))
    return np.frombuffer(data.tobytes(), cover.spec.dtype).reshape(cover.spec.shape)


@pytest.mark.parametrize("prefix", ["", "model", "state_dict", "weights", "app.net", "a"])
def test_the_model_is_where_the_optimizer_says(tmp_path: Path, prefix: str) -> None:
    state = sample()
    model: Any = state.pop("model")
    for part in reversed(prefix.split(".") if prefix else []):
        model = {part: model}
    catalog = read({**model, **state, "epoch": 3}, tmp_path / "c")
    assert list(catalog.tensors) == NAMES
    assert catalog.param_groups[0].params == tuple(NAMES)
    assert catalog.state == {"epoch": 3}


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_wrappers_are_no_part_of_names(tmp_path: Path, wrapper: str) -> None:
    state = sample()
    state["model"] = {wrapper + name: tensor for name, tensor in state["model"].items()}
    catalog = read(state, tmp_path / "c")
    assert list(catalog.tensors) == NAMES
    assert set(catalog.tensors["a.bias"].states) == {"value", "exp_avg", "exp_avg_sq"}


def test_wrappers_in_the_optimizer_too(tmp_path: Path) -> None:
    state = sample()
    state["model"] = {f"module.{name}": tensor for name, tensor in state["model"].items()}
    optim = state["optim"]
    optim["state"] = {f"module.{name}": held for name, held in optim["state"].items()}
    optim["param_groups"][0]["params"] = [f"module.{name}" for name in NAMES]
    catalog = read(state, tmp_path / "c")
    assert catalog.param_groups[0].params == tuple(NAMES)
    assert set(catalog.tensors["a.weight"].states) == {"value", "exp_avg", "exp_avg_sq"}


def test_names_that_only_wrappers_tell_apart_are_kept() -> None:
    assert cleaned(["_orig_mod.a", "a"]) == {"_orig_mod.a": "_orig_mod.a", "a": "a"}
    assert cleaned(["b._orig_mod.a", "my_orig_mod.a"]) == {"b._orig_mod.a": "b.a", "my_orig_mod.a": "my_orig_mod.a"}


def test_paths_below_a_prefix() -> None:
    assert below(("app", "optim", "state", 0), "app.optim.") == ("state", 0)
    assert below(("optim.state.a.b",), "optim.") == ("state.a.b",)
    assert below(("x",), "") == ("x",)
    assert split_name(("a.weight", "exp_avg"), NAMES) == ("a.weight", ("exp_avg",))
    assert split_name(("a.weight.row.factor",), NAMES) == ("a.weight", ("row", "factor"))
    assert split_name((0, "exp_avg"), NAMES) == (0, ("exp_avg",))
    assert split_name(("0", "exp_avg"), ["0.weight"]) == (0, ("exp_avg",))
    assert split_name(("0.weight.exp_avg",), ["0.weight"]) == ("0.weight", ("exp_avg",))


def test_numbers_in_the_order_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5)
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    saved = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    catalog = read(saved, tmp_path / "c", frozen="1.running_*")
    named = dict(module.named_parameters())
    assert [name for name, tensor in catalog.tensors.items() if tensor.kind == "parameter"] == list(named)
    assert catalog.tensors["1.running_mean"].kind == "buffer"
    for name, parameter in named.items():
        expected = optimizer.state[parameter]["exp_avg"].numpy()
        assert np.array_equal(values(catalog, name, "exp_avg"), expected)
    assert catalog.param_groups[0].params == tuple(named)
    assert catalog.param_groups[0].options["lr"] == 0.5


def test_saved_parameter_names_are_believed(tmp_path: Path) -> None:
    """``param_names`` is what torch keeps of optimizers that were made of named parameters."""
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([("b", b), ("a", a)], lr=0.1, momentum=0.9)
    (a.sum() + 2 * b.sum()).backward()
    optimizer.step()
    catalog = read({"model": {"a": a.data, "b": b.data}, "optimizer": optimizer.state_dict()}, tmp_path / "c")
    assert values(catalog, "a", "momentum_buffer").tolist() == [1.0] * 3
    assert values(catalog, "b", "momentum_buffer").tolist() == [2.0] * 3
    assert catalog.param_groups[0].params == ("b", "a")
    assert "param_names" not in catalog.param_groups[0].options


def test_a_state_that_was_saved_in_one_piece(tmp_path: Path) -> None:
    """Without flattening, everything but tensors at the top is one pickled object."""
    state = sample()
    flat = {**state["model"], "optimizer": state["optim"]}
    folder = save(flat, tmp_path / "c", planner=DefaultSavePlanner(flatten_state_dict=False))
    catalog = CONVERTER.read(open_store(str(folder)))
    assert list(catalog.tensors) == NAMES
    expected = state["optim"]["state"]["a.weight"]["exp_avg"].numpy()
    assert np.array_equal(values(catalog, "a.weight", "exp_avg"), expected)
    assert catalog.tensors["a.bias"].scalars["step"].value == 3.0


def test_metadata_as_older_torch_pickled_it(tmp_path: Path) -> None:
    """Up to torch 2.2 properties were of a class of ShardedTensor, and there was no version."""
    folder = save(sample(), tmp_path / "c")

    def change(metadata: Metadata) -> None:
        for entry in metadata.state_dict_metadata.values():
            if hasattr(entry, "properties"):
                entry.properties = OldProperties(dtype=entry.properties.dtype)
        for name in ("version", "storage_meta"):
            del metadata.__dict__[name]

    edit(folder, change)
    assert b"_shard.sharded_tensor" in (folder / ".metadata").read_bytes()
    catalog = CONVERTER.read(open_store(str(folder)))
    assert np.array_equal(values(catalog, "a.bias"), sample()["model"]["a.bias"].numpy())
    assert catalog.source.version == ""


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_other_pickle_protocols_are_recognised(tmp_path: Path, protocol: int) -> None:
    folder = save(sample(), tmp_path / "c")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    assert CONVERTER.detect(open_store(str(folder)))
    assert list(CONVERTER.read(open_store(str(folder))).tensors) == NAMES


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"model": {"t": torch.arange(12.0).view(3, 4).t(), "image": image, "part": torch.arange(9)[2:5]}}
    catalog = read(state, tmp_path / "c")
    assert values(catalog, "t").tolist() == state["model"]["t"].tolist()
    assert np.array_equal(values(catalog, "image"), image.numpy())
    assert values(catalog, "part").tolist() == [2, 3, 4]


@pytest.mark.parametrize("dtype", list(ITEMSIZE))
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    data = torch.arange(48, dtype=torch.uint8) % 2
    tensor = data.bool() if kind is torch.bool else data.view(kind)
    catalog = read({"model": {"t": tensor}}, tmp_path / "c")
    cover = catalog.cover("t", "value")
    assert (cover.spec.dtype, cover.spec.shape) == (dtype, tuple(tensor.shape))
    held = read_region(open_store(catalog.url), cover, Box.whole(cover.spec.shape))
    assert held.tobytes() == data.numpy().tobytes()


def test_empty_tensors_and_scalars(tmp_path: Path) -> None:
    catalog = read({"model": {"none": torch.zeros(0, 3), "one": torch.tensor(2.5)}}, tmp_path / "c")
    assert values(catalog, "none").shape == (0, 3)
    assert values(catalog, "one") == 2.5


@pytest.mark.parametrize("case", ["tied", "other values", "constant", "trained as well", "without checksums"])
def test_what_is_taken_for_tied(tmp_path: Path, case: str) -> None:
    state = sample()
    weight = state["model"]["a.weight"]
    if case == "constant":
        weight.fill_(0.5)
    head = weight.clone()
    if case == "other values":
        head[5, 3] += 1
    state["model"]["head"] = head
    if case == "trained as well":
        state["optim"]["state"]["head"] = state["optim"]["state"]["a.weight"]
    set_crc32_options(compute_crc32=case != "without checksums")
    try:
        catalog = read(state, tmp_path / "c")
    finally:
        set_crc32_options(compute_crc32=True)
    assert catalog.ties == ({"head": "a.weight"} if case == "tied" else {})
    assert ("head" in catalog.tensors) is (case != "tied")


def test_averaged_weights_are_tensors_too(tmp_path: Path) -> None:
    state = sample()
    state["ema"] = {name: tensor * 0.5 for name, tensor in state["model"].items()}
    catalog = read(state, tmp_path / "c")
    assert np.array_equal(values(catalog, "ema.a.weight"), state["ema"]["a.weight"].numpy())
    assert catalog.tensors["ema.a.weight"].kind == "buffer"
    assert any("ema.a.bias" in note for note in catalog.notes)
    assert catalog.state == {}


def test_training_state_under_the_names_of_ucp(tmp_path: Path) -> None:
    state = sample()
    state |= {
        "rng_state": torch.arange(5, dtype=torch.uint8),
        "scheduler": {"last_epoch": 7},
        "grad_scaler": {"scale": 1024.0, "growth_factor": 2.0},
        "train": {"consumed_samples": 640, "best": 0.5},
    }
    catalog = read(state, tmp_path / "c")
    told = progress(catalog)
    assert (told.iteration, told.consumed_samples, told.lr_scheduler) == (3, 640, {"last_epoch": 7})
    assert told.loss_scale == {"scale": 1024.0, "growth_factor": 2.0}
    assert leaf_numpy(open_store(catalog.url), told.rng).tolist() == [0, 1, 2, 3, 4]
    assert catalog.state["train"] == {"best": 0.5}


def test_states_that_are_no_tensors(tmp_path: Path) -> None:
    state = sample()
    held = state["optim"]["state"]["a.bias"]
    held["step"], held["history"] = 3, [1, 2]
    catalog = read(state, tmp_path / "c")
    assert (catalog.tensors["a.bias"].scalars["step"].value, catalog.tensors["a.bias"].scalars["step"].dtype) == (
        3,
        "int",
    )
    assert catalog.state["optimizer"]["state"]["a.bias"] == {"history": [1, 2]}


def test_a_learning_rate_that_is_a_tensor(tmp_path: Path) -> None:
    state = sample()
    state["optim"]["param_groups"][0]["lr"] = torch.tensor(0.25)
    catalog = read(state, tmp_path / "c")
    assert leaf_numpy(open_store(catalog.url), catalog.param_groups[0].options["lr"]).item() == 0.25


def test_model_option(tmp_path: Path) -> None:
    state = {"teacher": sample()["model"], "student": {"w": torch.ones(2)}}
    catalog = read(state, tmp_path / "c", model="student")
    assert "w" in catalog.tensors
    assert catalog.options == {"model": "student."}


@pytest.mark.parametrize("names", [("ema", "net_g"), ("teacher", "student"), ("model", "module")])
def test_two_models_that_the_optimizer_could_train(tmp_path: Path, names: tuple[str, str]) -> None:
    state = sample()
    model = state.pop("model")
    averaged = {name: tensor + 1 for name, tensor in model.items()}
    folder = save({names[0]: averaged, names[1]: model, **state}, tmp_path / "c")
    with pytest.raises(FitError, match=". ".join(sorted(names))) as caught:
        CONVERTER.read(open_store(str(folder)))
    assert "model=" in str(caught.value.hint)
    catalog = CONVERTER.read(open_store(str(folder)), model=names[1])
    assert np.array_equal(values(catalog, "a.weight"), model["a.weight"].numpy())


def test_a_model_among_averages_of_it(tmp_path: Path) -> None:
    state = sample()
    averaged = {name: tensor + 1 for name, tensor in state["model"].items()}
    catalog = read({"a_ema": averaged, **state}, tmp_path / "c")
    assert np.array_equal(values(catalog, "a.weight"), state["model"]["a.weight"].numpy())


@pytest.mark.parametrize("step", [float("inf"), float("nan"), torch.tensor(float("nan"))])
def test_steps_that_are_no_numbers(tmp_path: Path, step: Any) -> None:
    state = sample()
    for held in state["optim"]["state"].values():
        held["step"] = step
    catalog = read(state, tmp_path / "c")
    assert catalog.step is None
    assert any("no finite numbers" in note for note in catalog.notes)


@pytest.mark.parametrize("names", [[["x"], "b"], 5, "ab", [{}, {}]])
def test_param_names_that_are_none(tmp_path: Path, names: Any) -> None:
    state = sample()
    states = state["optim"]["state"]
    group = {"params": [0, 1], "lr": 0.1, "param_names": names}
    state["optim"] = {"state": dict(enumerate(states.values())), "param_groups": [group]}
    catalog = read(state, tmp_path / "c")
    assert catalog.param_groups[0].params == tuple(NAMES)


@pytest.mark.parametrize("name", ["\u00b3", "9" * 5000])
def test_numbers_of_parameters_that_are_none(name: str) -> None:
    assert split_name((name, "exp_avg"), ()) == (name, ("exp_avg",))
    assert split_name((f"{name}.exp_avg",), ()) == (name, ("exp_avg",))
